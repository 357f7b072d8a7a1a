"""Training of any model: the loop, its settings, objectives, optimizers, and the run's directory."""
