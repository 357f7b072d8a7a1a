"""Models that read pictures and write text."""
