"""Hybrids: language models whose layers are in part recurrent, with a state of fixed size."""
