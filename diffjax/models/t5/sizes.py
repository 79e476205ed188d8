"""The sizes of T5 (Raffel et al. 2020), and of T5 1.1, whose XXL Imagen, SD 3 and Flux use."""

from collections.abc import Mapping

from diffjax.pretrained.family import Size


def _size(
    num_parameters: int,
    width: int,
    depth: int,
    heads: tuple[int, int],
    mlp_width: int,
    gated: bool,
) -> Size:
    """A size; `heads` are their number and width."""
    shape = {"width": width, "depth": depth, "num_heads": heads[0], "head_width": heads[1]}
    return Size({**shape, "mlp_width": mlp_width, "gated": gated}, num_parameters)


SIZES: Mapping[str, Size] = {
    "t5-v1.1-small": _size(35_332_800, 512, 8, (6, 64), 1024, True),
    "t5-v1.1-base": _size(109_628_544, 768, 12, (12, 64), 2048, True),
    "t5-v1.1-large": _size(341_231_104, 1024, 24, (16, 64), 2816, True),
    "t5-v1.1-xl": _size(1_223_527_424, 2048, 24, (32, 64), 5120, True),
    "t5-v1.1-xxl": _size(4_762_310_656, 4096, 24, (64, 64), 10_240, True),
    "t5-small": _size(35_330_816, 512, 6, (8, 64), 2048, False),
    "t5-base": _size(109_628_544, 768, 12, (12, 64), 3072, False),
    "t5-large": _size(334_939_648, 1024, 24, (16, 64), 4096, False),
    "t5-3b": _size(1_240_909_824, 1024, 24, (32, 128), 16_384, False),
    "t5-11b": _size(4_864_791_552, 1024, 24, (128, 128), 65_536, False),
}
