"""Recipes for the perceptron and the multi-layer network."""
