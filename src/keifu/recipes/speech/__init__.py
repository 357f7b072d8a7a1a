"""Recipes that train speech models."""
