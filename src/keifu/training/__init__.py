"""How any model learns: the loop, its settings, objectives, optimizers, and the run's directory."""
