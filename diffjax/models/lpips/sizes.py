"""The one published size of LPIPS with VGG16.

Its weights are in two files: the convolutions in torchvision's `vgg16-397923af.pth` (BSD), and the
weights of channels in `lpips/weights/v0.1/vgg.pth` of richzhang/PerceptualSimilarity (BSD).
"""

from collections.abc import Mapping

from diffjax.pretrained.family import Size

SIZES: Mapping[str, Size] = {"vgg": Size({}, 14_714_688 + 1_472)}
"""The parameters of 13 convolutions, and weights of 1,472 channels."""
