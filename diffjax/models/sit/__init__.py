"""SiT: DiT trained by interpolants (Ma et al. 2024, arXiv:2401.08740)."""
