"""Key-value memory of an engine in blocks: the pool, the state of a step, and CUDA graphs of steps."""
