"""Losses, and log-probabilities of given tokens, as sums over elements; a large head never has all its logits."""
