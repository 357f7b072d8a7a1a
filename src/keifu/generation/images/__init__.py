"""Sampling of pictures: pipelines, denoisers, diffusion samplers."""
