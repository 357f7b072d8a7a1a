"""Training by several processes: the mesh, splitting a built model over the mesh, sharded checkpoints, and the report
of a dead process.
"""
