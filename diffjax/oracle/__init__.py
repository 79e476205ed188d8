"""Exact solutions: mixtures with a known best denoiser, their flow maps, verified objectives."""
