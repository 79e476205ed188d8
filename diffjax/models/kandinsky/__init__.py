"""Kandinsky 2.1 and 2.2: U-Nets that make a picture of an image's embedding by CLIP."""

from diffjax.models.kandinsky.network import KandinskyUNet as KandinskyUNet
from diffjax.models.kandinsky.sizes import SIZES as SIZES
