"""Mixtures of experts: language models in which each token uses only some of the weights."""
