"""Recipes that train models which hear."""
