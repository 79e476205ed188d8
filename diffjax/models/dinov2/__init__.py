"""DINOv2 vision transformers (Oquab et al. 2023, arXiv:2304.07193)."""
