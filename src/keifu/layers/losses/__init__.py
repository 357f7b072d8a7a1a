"""Losses, and log-probabilities of given tokens, as sums over elements. The whole logits of a large vocabulary are
never in memory."""
