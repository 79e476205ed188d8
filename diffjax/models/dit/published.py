"""The layout of the authors' files (facebookresearch/DiT).

Queries, keys and values are thirds of one matrix, modulations are shift, scale and gate, and the
numbers of an output patch are ordered by row, column and channel, all as here. Files hold the fixed
positions too, which depend on the size of the images. Twice the channels come out: the predicted
noise, and the learned variance.

The authors' sampling guides three of four channels, and evaluates the network at whole timesteps 0
to 999.
"""

import math
from collections.abc import Mapping
from typing import Any

from diffjax.models.dit import tables
from diffjax.models.dit.network import DiT
from diffjax.models.dit.sizes import SIZES
from diffjax.pretrained.family import Denoiser, Family
from diffjax.pretrained.tables import Row, Table, count


def _table(denoiser: Denoiser) -> Table:
    network = denoiser.network
    patches = tables.patches_by_conv(network.hidden_size, network.patch_size)
    return (
        tables.fixed_positions(denoiser),
        Row("x_embedder.proj.weight", "patch_embedding/kernel", patches),
        Row("x_embedder.proj.bias", "patch_embedding/bias"),
        *tables.conditioning(),
        *tables.final_layers(),
        *tables.blocks(network, (*tables.dit_block(network), *tables.gelu_mlp())),
    )


def dit(
    image_shape: tuple[int, int, int] = (32, 32, 4),
    num_classes: int = 1000,
    out_channels: int = 8,
    **settings: Any,
) -> Denoiser:
    """A DiT with the authors' settings: latents of 256 pixels, ImageNet, learned variance."""
    return Denoiser(DiT(num_classes, out_channels=out_channels, **settings), image_shape)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The settings of a network with DiT's names that follow from the shapes of its tensors."""
    hidden_size, channels, patch, _ = shapes["x_embedder.proj.weight"]
    side = patch * math.isqrt(shapes["pos_embed"][1])
    return {
        "patch_size": patch,
        "hidden_size": hidden_size,
        "depth": count("blocks.{i}.attn.qkv.bias", shapes),
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
        "out_channels": shapes["final_layer.linear.bias"][0] // patch**2,
        "image_shape": (side, side, channels),
    }


FAMILY = Family("DiT", dit, SIZES, _table, recognise, lambda denoiser: denoiser.inputs)
