"""Recipes that fine-tune and align assistants."""
