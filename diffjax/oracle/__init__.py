"""Exact solutions: data with a known best denoiser, their flow maps, checks of objectives."""
