"""More than one process: the mesh, how a built model is split over it, its checkpoints, and starting the processes."""
