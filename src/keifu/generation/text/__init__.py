"""Decoding of text: sampling, beam search, likelihood, chat, translation."""
