"""The one published size of the FID Inception network, and its file.

As many parameters as Inception v3 with 1008 classes and without the auxiliary classifier, less the
bias of the logits.
"""

from collections.abc import Mapping

from diffjax.pretrained.family import Size

SIZES: Mapping[str, Size] = {
    "2015-12-05": Size(
        {},
        23_884_384,
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    )
}
