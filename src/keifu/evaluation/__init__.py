"""Evaluation of models: figures and plots."""
