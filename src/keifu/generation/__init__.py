"""How models write text and sample pictures."""
