"""Quality of generated pictures, and of matching text with pictures."""
