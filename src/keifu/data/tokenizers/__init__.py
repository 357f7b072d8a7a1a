"""Tokenizers: training, encoding, decoding, chat templates, and their files."""
