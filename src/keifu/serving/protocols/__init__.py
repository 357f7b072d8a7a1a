"""APIs of other services, translated to OpenAI's conversations."""
