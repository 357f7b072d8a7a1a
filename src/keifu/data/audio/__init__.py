"""Sound files and their features."""
