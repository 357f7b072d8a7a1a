"""Models that differ from an earlier one, mostly LLaMA, in a few points."""
