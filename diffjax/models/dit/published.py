"""The layout of the authors' files (facebookresearch/DiT).

Queries, keys and values are thirds of one matrix, modulations are shift, scale and gate, and the
numbers of an output patch are ordered by row, column and channel, all as here. Files hold the fixed
positions too, which depend on the size of the images. Twice the channels come out: the predicted
noise, and the learned variance.

The authors' sampling guides three of four channels, and evaluates the network at whole timesteps 0
to 999.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from diffjax.models.dit.network import DiT
from diffjax.models.dit.patches import positions_2d
from diffjax.models.dit.sizes import SIZES
from diffjax.models.layers import STACKED
from diffjax.pretrained.family import Denoiser, Family
from diffjax.pretrained.tables import Row, Table, count
from diffjax.pretrained.transforms import constant, conv, dense, keep, reshape, stack, then

_LAYERS = (
    ("t_embedder.mlp.0", "conditioning/hidden"),
    ("t_embedder.mlp.2", "conditioning/out"),
    ("final_layer.adaLN_modulation.1", "final_modulation"),
    ("final_layer.linear", "final_out"),
)
_LAYERS_OF_A_BLOCK = (
    ("adaLN_modulation.1", "modulation"),
    ("attn.qkv", "attention/qkv"),
    ("attn.proj", "attention/out"),
    ("mlp.fc1", "mlp/up"),
    ("mlp.fc2", "mlp/down"),
)


def _table(denoiser: Denoiser) -> Table:
    height, width, _ = denoiser.image_shape
    size, patch = denoiser.network.hidden_size, denoiser.network.patch_size
    patches = then(conv, reshape(ours=(-1, size), theirs=(patch, patch, -1, size)))
    return (
        Row(
            "pos_embed",
            (),
            constant(lambda: positions_2d(height // patch, width // patch, size)[None]),
        ),
        Row("x_embedder.proj.weight", "patch_embedding/kernel", patches),
        Row("x_embedder.proj.bias", "patch_embedding/bias"),
        Row("y_embedder.embedding_table.weight", "conditioning/label/embedding"),
        *(Row(f"{theirs}.weight", f"{ours}/kernel", dense) for theirs, ours in _LAYERS),
        *(Row(f"{theirs}.bias", f"{ours}/bias") for theirs, ours in _LAYERS),
        *_blocks(denoiser.network),
    )


def _blocks(network: DiT) -> Iterator[Row]:
    for theirs, ours in _LAYERS_OF_A_BLOCK:
        for kind, name, how in (("weight", "kernel", dense), ("bias", "bias", keep)):
            if network.scan:
                each = tuple(f"blocks.{i}.{theirs}.{kind}" for i in range(network.depth))
                yield Row(each, f"{STACKED}/{ours}/{name}", stack(how))
            else:
                yield Row(f"blocks.{{i}}.{theirs}.{kind}", f"block_{{i}}/{ours}/{name}", how)


def dit(
    image_shape: tuple[int, int, int] = (32, 32, 4),
    num_classes: int = 1000,
    out_channels: int = 8,
    **settings: Any,
) -> Denoiser:
    """A DiT with the authors' settings: latents of 256 pixels, ImageNet, learned variance."""
    return Denoiser(DiT(num_classes, out_channels=out_channels, **settings), image_shape)


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
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


FAMILY = Family("DiT", dit, SIZES, _table, _recognise, lambda denoiser: denoiser.inputs)
