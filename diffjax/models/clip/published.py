"""The layout of CLIP in transformers (`CLIPModel`, `CLIPVisionModelWithProjection`).

Weights of queries, keys and values are three matrices, and one here. The encoder of texts is left
out. Embeddings of patches have no bias, and the name `pre_layrnorm` is theirs.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.models.clip.network import ClipVision, clip_vision
from diffjax.models.clip.sizes import SIZES
from diffjax.pretrained.family import Family
from diffjax.pretrained.tables import Row, count
from diffjax.pretrained.transforms import conv, dense, merge

_EMBEDDINGS = "vision_model.embeddings"
_LAYER = "vision_model.encoder.layers.{i}"


def _of_qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{_LAYER}.self_attn.{part}_proj.{kind}" for part in "qkv")


TABLE = (
    Row(f"{_EMBEDDINGS}.class_embedding", "vit/class_token"),
    Row(f"{_EMBEDDINGS}.position_embedding.weight", "vit/positions"),
    Row(f"{_EMBEDDINGS}.patch_embedding.weight", "vit/patches/kernel", conv),
    Row("vision_model.pre_layrnorm.weight", "vit/norm_before/scale"),
    Row("vision_model.pre_layrnorm.bias", "vit/norm_before/bias"),
    Row(f"{_LAYER}.layer_norm{{n}}.weight", "vit/block_{i}/norm{n}/scale"),
    Row(f"{_LAYER}.layer_norm{{n}}.bias", "vit/block_{i}/norm{n}/bias"),
    Row(_of_qkv("weight"), "vit/block_{i}/attention/qkv/kernel", merge(3, dense)),
    Row(_of_qkv("bias"), "vit/block_{i}/attention/qkv/bias", merge(3)),
    Row(f"{_LAYER}.self_attn.out_proj.weight", "vit/block_{i}/attention/out/kernel", dense),
    Row(f"{_LAYER}.self_attn.out_proj.bias", "vit/block_{i}/attention/out/bias"),
    Row(f"{_LAYER}.mlp.fc1.weight", "vit/block_{i}/up/kernel", dense),
    Row(f"{_LAYER}.mlp.fc1.bias", "vit/block_{i}/up/bias"),
    Row(f"{_LAYER}.mlp.fc2.weight", "vit/block_{i}/down/kernel", dense),
    Row(f"{_LAYER}.mlp.fc2.bias", "vit/block_{i}/down/bias"),
    Row("vision_model.post_layernorm.weight", "vit/norm/scale"),
    Row("vision_model.post_layernorm.bias", "vit/norm/bias"),
    Row("visual_projection.weight", "projection/kernel", dense),
)


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    num_positions, width = shapes[f"{_EMBEDDINGS}.position_embedding.weight"]
    wide = shapes[f"{_LAYER}.mlp.fc1.weight".format(i=0)][0]
    further = {} if wide == 4 * width else {"mlp_width": wide}
    return {
        **further,
        "width": width,
        "depth": count(f"{_LAYER}.layer_norm1.weight", shapes),
        "num_features": shapes["visual_projection.weight"][0],
        "grid": math.isqrt(num_positions - 1),
        "patch": shapes[f"{_EMBEDDINGS}.patch_embedding.weight"][-1],
    }


def _inputs(network: ClipVision) -> tuple[jax.ShapeDtypeStruct]:
    side = network.vit.grid * network.vit.patch
    return (jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),)


FAMILY = Family(
    "CLIP",
    clip_vision,
    SIZES,
    lambda _: TABLE,
    _recognise,
    _inputs,
    unused=(
        "text_model.*",
        "text_projection.*",
        "logit_scale",
        f"{_EMBEDDINGS}.position_ids",
    ),
)
