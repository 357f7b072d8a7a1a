"""Published configs of transformers, diffusers and open_clip, read and written."""
