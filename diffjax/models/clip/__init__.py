"""CLIP, of which the image encoder is here (Radford et al. 2021, arXiv:2103.00020)."""
