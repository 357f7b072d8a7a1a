"""DDPM, latent diffusion, and their networks."""
