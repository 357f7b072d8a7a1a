"""Evaluation of classifiers (accuracy, confusion matrix) and of text embeddings."""
