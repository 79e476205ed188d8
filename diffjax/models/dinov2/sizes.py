"""The published sizes of DINOv2 (Oquab et al. 2023, table 17) and their files.

Published counts have one token more, which hides patches in training and is left out here.
"""

from collections.abc import Mapping

from diffjax.pretrained.family import Size


def url(model: str) -> str:
    """The URL of a network's published file of weights.

    Example:
        >>> url("vits14_reg4").rpartition("/")[2]
        'dinov2_vits14_reg4_pretrain.pth'
    """
    folder = model.removesuffix("_reg4")
    return f"https://dl.fbaipublicfiles.com/dinov2/dinov2_{folder}/dinov2_{model}_pretrain.pth"


_S = {"width": 384, "depth": 12, "num_heads": 6, "num_registers": 0}
_B = {"width": 768, "depth": 12, "num_heads": 12, "num_registers": 0}
_L = {"width": 1024, "depth": 24, "num_heads": 16, "num_registers": 0}
_REGISTERS = {"num_registers": 4}
_ROWS = (
    ("vits14", _S, 22_056_192, "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    ("vitb14", _B, 86_579_712, "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
    ("vitl14", _L, 304_367_616, "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
    (
        "vits14_reg4",
        _S | _REGISTERS,
        22_057_728,
        "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb",
    ),
    (
        "vitb14_reg4",
        _B | _REGISTERS,
        86_582_784,
        "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71",
    ),
    (
        "vitl14_reg4",
        _L | _REGISTERS,
        304_371_712,
        "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51",
    ),
)

SIZES: Mapping[str, Size] = {
    name: Size(settings, num_parameters, url(name), sha256)
    for name, settings, num_parameters, sha256 in _ROWS
}
