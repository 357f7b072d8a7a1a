"""Image generation: pipelines, denoisers and diffusion samplers."""
