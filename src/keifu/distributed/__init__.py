"""Several processes: the mesh, the split of a built model over it, sharded checkpoints, and the report of a dead
process.
"""
