"""A run's directory: checkpoints, metrics, progress, and the report."""
