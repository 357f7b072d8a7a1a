"""Recipes that train translators."""
