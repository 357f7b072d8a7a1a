"""DALL-E 1: the discrete autoencoder, and the decoder over text and image tokens."""
