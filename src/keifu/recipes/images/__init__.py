"""Recipes that train on pictures."""
