"""Prompts of conversations, with and without pictures, and the conversation with a model."""
