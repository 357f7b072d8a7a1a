"""Recipes that train classifiers."""
