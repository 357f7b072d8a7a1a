"""Plots for people: decision boundaries."""
