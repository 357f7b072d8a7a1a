"""Evaluation of generated images, and of image-text retrieval."""
