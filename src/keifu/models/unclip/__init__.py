"""unCLIP (DALL-E 2): prior, decoder, and conditioning."""
