"""Sound in: files, features."""
