"""Memory, FLOPs and number formats of the machine that trains."""
