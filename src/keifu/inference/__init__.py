"""Inference: text generation and image sampling."""
