"""Transformer blocks, and the decoder and encoder-decoder made of them."""
