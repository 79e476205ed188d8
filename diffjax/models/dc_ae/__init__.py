"""DC-AE: deep compression autoencoders (Chen et al. 2024, arXiv:2410.10733)."""
