"""Scripts that train a latent diffusion model, and their helpers; not part of the installed package."""
