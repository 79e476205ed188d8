"""The layout of the authors' files (LTH14/JiT): DiT's, with a fused gated MLP.

A file of their training has the averages `model_ema1`, by which they sample. Pairs of neighbours in
a head are rotated there, by the row in the first half of the pairs and by the column in the second.

Time is 0 for noise and 1 for data, and is embedded without a scale; the network predicts the clean
image. For images of 512 pixels the noise is twice as large. Their sampling is 50 steps of Heun,
guided between times 0.1 and 1, of the velocity `(x - z) / max(1 - t, 0.05)`.
"""

import math
from collections.abc import Mapping
from typing import Any

from diffjax.models.dit import tables
from diffjax.models.jit.network import JiT
from diffjax.models.jit.sizes import SIZES
from diffjax.pretrained.family import Denoiser, Family, Published
from diffjax.pretrained.tables import Row, Table, count, within
from diffjax.pretrained.transforms import conv, squeeze, then

_PREFIX = "net"
"""Of the names in a file: the network is a part of the authors' `Denoiser`."""


def _table(denoiser: Denoiser) -> Table:
    network = denoiser.network
    order = tables.pairs_of_neighbours(network.hidden_size // network.num_heads)
    block = (*tables.dit_block(network, order), *tables.fused_swiglu())
    patches = tables.patches_by_conv(network.bottleneck, network.patch_size)
    rows = (
        tables.fixed_positions(denoiser),
        Row("in_context_posemb", "class_tokens", squeeze(0)),
        Row("x_embedder.proj1.weight", "patch_bottleneck/kernel", patches),
        Row("x_embedder.proj2.weight", "patch_embedding/kernel", then(conv, squeeze_window)),
        Row("x_embedder.proj2.bias", "patch_embedding/bias"),
        *tables.conditioning(),
        *tables.final_layers(),
        *tables.blocks(network, block),
    )
    return within(rows, _PREFIX)


squeeze_window = squeeze(0, 1)
"""A convolution over one place is a dense layer."""


def jit(
    image_shape: tuple[int, int, int] | None = None, num_classes: int = 1000, **settings: Any
) -> Denoiser:
    """A JiT with the authors' settings: ImageNet, and 16 by 16 patches of an image."""
    network = JiT(num_classes, **settings)
    side = 16 * network.patch_size
    return Denoiser(network, image_shape or (side, side, 3))


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    shapes = {name.removeprefix(f"{_PREFIX}."): shape for name, shape in shapes.items()}
    bottleneck, channels, patch, _ = shapes["x_embedder.proj1.weight"]
    side = patch * math.isqrt(shapes["pos_embed"][1])
    return {
        "patch_size": patch,
        "hidden_size": shapes["x_embedder.proj2.weight"][0],
        "depth": count("blocks.{i}.attn.qkv.bias", shapes),
        "bottleneck": bottleneck,
        "num_class_tokens": shapes.get("in_context_posemb", (1, 0))[1],
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
        "image_shape": (side, side, channels),
    }


def _published(denoiser: Denoiser) -> Published:
    twice = denoiser.image_shape[0] == 512
    return Published(
        objective="objective=jit,path=linear_twice_noise" if twice else "objective=jit",
        solver="heun",
        grid="uniform",
        num_steps=50,
        guidance_scale=2.9,
        guidance="cfg+limited_jit_512" if twice else "cfg+limited_jit",
    )


FAMILY = Family(
    "JiT",
    jit,
    SIZES,
    _table,
    _recognise,
    lambda denoiser: denoiser.inputs,
    published=_published,
)
