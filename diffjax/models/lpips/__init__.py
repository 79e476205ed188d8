"""LPIPS: a distance of images by features of VGG16 (Zhang et al. 2018, arXiv:1801.03924)."""
