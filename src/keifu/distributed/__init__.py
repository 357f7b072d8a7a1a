"""More than one process: the mesh, how a built model is split over it, its checkpoints, what is said when one dies."""
