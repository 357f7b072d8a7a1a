"""Optimizers, learning-rate schedules, weight averaging, and recovery from loss spikes."""
