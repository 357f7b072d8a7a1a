"""Memory of an engine in blocks: the pool, the state of a step, and its replay on a GPU."""
