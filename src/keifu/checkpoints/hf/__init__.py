"""Hugging Face directories: reading, writing, and the names of weights."""
