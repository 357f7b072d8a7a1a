"""Tokenizers: training, encoding, decoding, chat templates, and file formats."""
