"""Mixtures of experts: language models whose tokens use a part of the weights."""
