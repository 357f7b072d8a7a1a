"""Sentence pairs: reading, splitting, and batches by length."""
