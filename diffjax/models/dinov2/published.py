"""The layout of the authors' files (facebookresearch/dinov2).

Weights of queries, keys and values are one matrix, in this order, as here. `mask_token` hides
patches in training and is left out.
"""

import math
from typing import Any

from diffjax.models.dinov2.network import PATCH, dinov2
from diffjax.models.dinov2.sizes import SIZES
from diffjax.pretrained.family import Family, ImageShape, Shapes
from diffjax.pretrained.tables import Row, count
from diffjax.pretrained.transforms import conv, dense, squeeze

TABLE = (
    Row("cls_token", "class_token", squeeze(0, 1)),
    Row("pos_embed", "positions", squeeze(0)),
    Row("register_tokens", "registers", squeeze(0)),
    Row("patch_embed.proj.weight", "patches/kernel", conv),
    Row("patch_embed.proj.bias", "patches/bias"),
    Row("blocks.{i}.norm{n}.weight", "block_{i}/norm{n}/scale"),
    Row("blocks.{i}.norm{n}.bias", "block_{i}/norm{n}/bias"),
    Row("blocks.{i}.attn.qkv.weight", "block_{i}/attention/qkv/kernel", dense),
    Row("blocks.{i}.attn.qkv.bias", "block_{i}/attention/qkv/bias"),
    Row("blocks.{i}.attn.proj.weight", "block_{i}/attention/out/kernel", dense),
    Row("blocks.{i}.attn.proj.bias", "block_{i}/attention/out/bias"),
    Row("blocks.{i}.mlp.fc1.weight", "block_{i}/up/kernel", dense),
    Row("blocks.{i}.mlp.fc1.bias", "block_{i}/up/bias"),
    Row("blocks.{i}.mlp.fc2.weight", "block_{i}/down/kernel", dense),
    Row("blocks.{i}.mlp.fc2.bias", "block_{i}/down/bias"),
    Row("blocks.{i}.ls{n}.gamma", "block_{i}/scale{n}"),
    Row("norm.weight", "norm/scale"),
    Row("norm.bias", "norm/bias"),
)


def _recognise(shapes: Shapes) -> tuple[dict[str, Any], ImageShape]:
    grid = math.isqrt(shapes["pos_embed"][1] - 1)
    settings = {
        "width": shapes["cls_token"][-1],
        "depth": count("blocks.{i}.norm1.weight", shapes),
        "num_registers": shapes.get("register_tokens", (1, 0, 0))[1],
        "grid": grid,
    }
    return settings, (PATCH * grid, PATCH * grid, 3)


FAMILY = Family("DINOv2", dinov2, SIZES, lambda _: TABLE, _recognise, unused=("mask_token",))
