"""The layouts of CLIP's text encoders: those of transformers and that of OpenCLIP.

- `CLIPTextModelWithProjection` and, up to transformers 4, `CLIPTextModel`: names begin with
  `text_model.`. So do those of folders that are written here, which all versions read.
- `CLIPTextModel` since transformers 5: without.
- OpenCLIP, in files of whole models: queries, keys and values are one matrix, as here, and the
  projection is a matrix that vectors are multiplied by from the left.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.models.clip_text.network import ClipText
from diffjax.models.clip_text.sizes import SIZES
from diffjax.models.vit import ACTIVATIONS
from diffjax.pretrained.family import Config, Family
from diffjax.pretrained.tables import Row, count, layer, norm, within
from diffjax.pretrained.transforms import dense, merge

PREFIXES: Mapping[str, tuple[str, ...]] = {
    "text_encoder": (
        "cond_stage_model.transformer.",
        "cond_stage_model.model.",
        "conditioner.embedders.0.transformer.",
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
}
"""What names of text encoders begin with in files of whole models, by their names in pipelines."""

_LAYER = "encoder.layers.{i}"
_PREFIX = "text_model"
_WRONG_END = 2
"""The end of a text in configs of transformers before it had the right one, for any vocabulary."""


def encoders_in(names: Iterable[str]) -> dict[str, str]:
    """The text encoders in a file of a whole model, and what the names of each begin with.

    Example:
        >>> encoders_in(["conditioner.embedders.1.model.ln_final.bias", "first_stage_model.x"])
        {'text_encoder_2': 'conditioner.embedders.1.model.'}
    """
    names = list(names)
    return {
        part: prefix
        for part, prefixes in PREFIXES.items()
        for prefix in prefixes
        if any(name.startswith(prefix) for name in names)
    }


def _of_qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{_LAYER}.self_attn.{part}_proj.{kind}" for part in "qkv")


_BARE_TABLE = (
    Row("embeddings.token_embedding.weight", "tokens/embedding"),
    Row("embeddings.position_embedding.weight", "positions"),
    *norm(f"{_LAYER}.layer_norm1", "block_{i}/norm1"),
    *norm(f"{_LAYER}.layer_norm2", "block_{i}/norm2"),
    Row(_of_qkv("weight"), "block_{i}/attention/qkv/kernel", merge(3, dense)),
    Row(_of_qkv("bias"), "block_{i}/attention/qkv/bias", merge(3)),
    *layer(f"{_LAYER}.self_attn.out_proj", "block_{i}/attention/out"),
    *layer(f"{_LAYER}.mlp.fc1", "block_{i}/up"),
    *layer(f"{_LAYER}.mlp.fc2", "block_{i}/down"),
    *norm("final_layer_norm", "norm"),
)
_TABLE = (
    *within(_BARE_TABLE, _PREFIX),
    Row("text_projection.weight", "projection/kernel", dense),
)
_BLOCK = "transformer.resblocks.{i}"
_OPENCLIP_TABLE = (
    Row("token_embedding.weight", "tokens/embedding"),
    Row("positional_embedding", "positions"),
    *norm(f"{_BLOCK}.ln_1", "block_{i}/norm1"),
    *norm(f"{_BLOCK}.ln_2", "block_{i}/norm2"),
    Row(f"{_BLOCK}.attn.in_proj_weight", "block_{i}/attention/qkv/kernel", dense),
    Row(f"{_BLOCK}.attn.in_proj_bias", "block_{i}/attention/qkv/bias"),
    *layer(f"{_BLOCK}.attn.out_proj", "block_{i}/attention/out"),
    *layer(f"{_BLOCK}.mlp.c_fc", "block_{i}/up"),
    *layer(f"{_BLOCK}.mlp.c_proj", "block_{i}/down"),
    *norm("ln_final", "norm"),
    Row("text_projection", "projection/kernel"),
)


def _sizes(
    tokens: tuple[int, ...], positions: tuple[int, ...], up: tuple[int, ...], features: int
) -> dict[str, Any]:
    """The settings that shapes show; `up [mlp_width, width]` is of an MLP's first layer."""
    wide = None if up[0] == 4 * tokens[1] else up[0]
    return {
        "vocabulary": tokens[0],
        "width": tokens[1],
        "length": positions[0],
        "mlp_width": wide,
        "num_features": features,
    }


def _recognise(prefix: str) -> Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]]:
    def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        first = f"{prefix}{_LAYER}".format(i=0)
        found = _sizes(
            shapes[f"{prefix}embeddings.token_embedding.weight"],
            shapes[f"{prefix}embeddings.position_embedding.weight"],
            shapes[f"{first}.mlp.fc1.weight"],
            shapes.get("text_projection.weight", (0,))[0],
        )
        return found | {"depth": count(f"{prefix}{_LAYER}.layer_norm1.weight", shapes)}

    return recognise


def _recognise_openclip(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    found = _sizes(
        shapes["token_embedding.weight"],
        shapes["positional_embedding"],
        shapes[f"{_BLOCK.format(i=0)}.mlp.c_fc.weight"],
        shapes.get("text_projection", (0, 0))[1],
    )
    return found | {"depth": count(f"{_BLOCK}.ln_1.weight", shapes)}


def _inputs(network: ClipText) -> tuple[jax.ShapeDtypeStruct]:
    return (jax.ShapeDtypeStruct((1, network.length), jnp.int32),)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    entries = config.get("text_config") or config  # of a whole CLIP
    width, wide = int(entries["hidden_size"]), int(entries["intermediate_size"])
    activation = entries.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"its hidden_act is {activation!r}, not {' or '.join(ACTIVATIONS)}")
    end = entries.get("eos_token_id", _WRONG_END)
    return {
        "width": width,
        "depth": int(entries["num_hidden_layers"]),
        "num_heads": int(entries["num_attention_heads"]),
        "vocabulary": int(entries.get("vocab_size", 49_408)),
        "length": int(entries.get("max_position_embeddings", 77)),
        "mlp_width": None if wide == 4 * width else wide,
        "activation": activation,
        "epsilon": float(entries.get("layer_norm_eps", 1e-5)),
        "end": None if end in (None, _WRONG_END) else int(end),
    }


def _config(network: ClipText) -> dict[str, Any]:
    projects = "WithProjection" if network.num_features else ""
    # The ids of transformers' old configs, by which it too takes the largest id for the end.
    ends = (0, 1, _WRONG_END) if network.end is None else (network.end - 1, 1, network.end)
    return {
        "architectures": [f"CLIPTextModel{projects}"],
        "hidden_size": network.width,
        "intermediate_size": network.mlp_width or 4 * network.width,
        "num_hidden_layers": network.depth,
        "num_attention_heads": network.num_heads,
        "projection_dim": network.num_features or network.width,
        "vocab_size": network.vocabulary,
        "max_position_embeddings": network.length,
        "hidden_act": network.activation,
        "layer_norm_eps": network.epsilon,
        **dict(zip(("bos_token_id", "pad_token_id", "eos_token_id"), ends, strict=True)),
        "model_type": "clip_text_model",
    }


FAMILY = Family(
    "CLIP text",
    ClipText,
    SIZES,
    lambda _: _TABLE,
    _recognise(f"{_PREFIX}."),
    _inputs,
    unused=(
        "vision_model.*",
        "visual_projection.*",
        "logit_scale",
        f"{_PREFIX}.embeddings.position_ids",
    ),
    config=Config("", {}, _settings, _config, weights="model"),
)
BARE = replace(
    FAMILY,
    name="CLIP text of transformers 5",
    sizes={name: size for name, size in SIZES.items() if "num_features" not in size.settings},
    table=lambda _: _BARE_TABLE,
    recognise=_recognise(""),
    unused=("embeddings.position_ids",),
)
OPENCLIP = replace(
    FAMILY,
    name="CLIP text of OpenCLIP",
    table=lambda _: _OPENCLIP_TABLE,
    recognise=_recognise_openclip,
    unused=("visual.*", "logit_scale", "logit_bias", "attn_mask"),
    config=None,
)
