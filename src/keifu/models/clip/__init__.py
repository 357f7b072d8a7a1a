"""CLIP: the text encoder, the image encoder, and the model of both."""
