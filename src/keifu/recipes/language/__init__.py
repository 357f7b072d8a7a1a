"""Recipes that pretrain language models."""
