"""Accuracy and confusion of classifiers; what embeddings tell."""
