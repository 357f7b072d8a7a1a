"""Attention, its masks, key-value caches, position encodings, and axial patterns."""
