"""TAESD, the tiny autoencoders of Bohan (2023), distilled from those of latent diffusion models."""
