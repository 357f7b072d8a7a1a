"""Interfaces of other services, each translated to a conversation of OpenAI's."""
