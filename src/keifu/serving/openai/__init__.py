"""OpenAI's API: the bodies that it takes, and its routes."""
