"""diffusers' pipeline directories, and Stable Diffusion's original single file."""
