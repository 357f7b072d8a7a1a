"""Hardware of a training run: memory, FLOPs, number formats, and errors such as out of memory."""
