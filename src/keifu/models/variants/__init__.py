"""Later models that are LLaMA with one or two differences."""
