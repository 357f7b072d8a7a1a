"""Routes of OpenAI's API, and their request bodies."""
