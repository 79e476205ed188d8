"""RAE: autoencoders whose encoder is frozen DINOv2 (Zheng et al. 2025, arXiv:2510.11690)."""
