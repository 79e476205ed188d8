"""The layout of the authors' files (facebookresearch/dinov2).

Weights of queries, keys and values are one matrix, in this order, as here. `mask_token` hides
patches in training and is left out.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.models.dinov2.network import dinov2
from diffjax.models.dinov2.sizes import SIZES
from diffjax.models.vit import ViT
from diffjax.pretrained.family import Family
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


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        "width": shapes["cls_token"][-1],
        "depth": count("blocks.{i}.norm1.weight", shapes),
        "num_registers": shapes.get("register_tokens", (1, 0, 0))[1],
    }


def _inputs(network: ViT) -> tuple[jax.ShapeDtypeStruct]:
    side = network.grid * network.patch
    return (jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),)


FAMILY = Family(
    "DINOv2", dinov2, SIZES, lambda _: TABLE, _recognise, _inputs, unused=("mask_token",)
)
