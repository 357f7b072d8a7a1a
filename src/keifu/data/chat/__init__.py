"""Conversations, preferences and prompts, and batches of them."""
