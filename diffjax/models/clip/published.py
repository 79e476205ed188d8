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
from diffjax.models.vit import ACTIVATIONS
from diffjax.pretrained.family import Config, Family
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
    up = shapes[f"{_LAYER}.mlp.fc1.bias".format(i=0)][0]
    return {
        "width": width,
        "depth": count(f"{_LAYER}.layer_norm1.weight", shapes),
        "num_features": shapes["visual_projection.weight"][0],
        "grid": math.isqrt(num_positions - 1),
        "patch": shapes[f"{_EMBEDDINGS}.patch_embedding.weight"][-1],
        **({} if up == 4 * width else {"mlp_width": up}),
    }


def _inputs(network: ClipVision) -> tuple[jax.ShapeDtypeStruct]:
    side = network.vit.grid * network.vit.patch
    return (jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What shapes do not show."""
    entries = config.get("vision_config") or config  # of a whole CLIP
    epsilon = entries.get("layer_norm_eps", 1e-5)
    if epsilon != 1e-5:
        raise ValueError(f"its layer_norm_eps is {epsilon}, and 1e-5 is known")
    return {
        "num_heads": int(entries.get("num_attention_heads", 12)),
        "activation": str(entries.get("hidden_act", "quick_gelu")),
    }


def _config(network: ClipVision) -> dict[str, Any]:
    vit = network.vit
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "hidden_size": vit.width,
        "intermediate_size": vit.mlp_width or 4 * vit.width,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.num_heads,
        "image_size": vit.grid * vit.patch,
        "patch_size": vit.patch,
        "projection_dim": network.num_features,
        "hidden_act": next(name for name, act in ACTIVATIONS.items() if act is vit.activation),
        "layer_norm_eps": vit.epsilon,
        "model_type": "clip_vision_model",
    }


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
    config=Config("", {}, _settings, _config, weights="model"),
)
