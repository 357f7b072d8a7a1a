"""Noise schedules and sampling schedules of diffusion."""
