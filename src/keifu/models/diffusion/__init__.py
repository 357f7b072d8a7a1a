"""DDPM, latent diffusion, and the networks that they are made of."""
