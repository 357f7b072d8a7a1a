"""Encoders at work: embeddings of texts and pictures, classifiers, search, and attention maps."""
