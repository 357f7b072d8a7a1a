"""Attention: masks, key-value cache, positions, and axial patterns."""
