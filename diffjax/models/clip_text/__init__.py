"""The text encoders of CLIP and OpenCLIP (Radford et al. 2021, arXiv:2103.00020)."""
