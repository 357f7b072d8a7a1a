"""HTTP service: OpenAI's API for programs and one page for people, on the engine of each model."""
