"""Later models that differ from LLaMA in one or two points."""
