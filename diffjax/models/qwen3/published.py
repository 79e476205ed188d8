"""The layout of transformers (`Qwen3ForCausalLM`, and `Qwen3Model` without the prefix)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.models.qwen3.network import Qwen3
from diffjax.models.qwen3.sizes import SIZES
from diffjax.pretrained.family import Config, Family
from diffjax.pretrained.tables import Row, Table, count
from diffjax.pretrained.transforms import dense

_TOKENS = 512  # what Flux.2 reads
_BLOCK = "model.layers.{i}"
_ATTENTION, _MLP = f"{_BLOCK}.self_attn", f"{_BLOCK}.mlp"


def _table(network: Qwen3) -> Table:
    del network
    return (
        Row("model.embed_tokens.weight", "tokens/embedding"),
        Row(f"{_BLOCK}.input_layernorm.weight", "block_{i}/norm1/scale"),
        Row(f"{_BLOCK}.post_attention_layernorm.weight", "block_{i}/norm2/scale"),
        *(
            Row(f"{_ATTENTION}.{part}_proj.weight", f"block_{{i}}/{ours}/kernel", dense)
            for part, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))
        ),
        *(
            Row(f"{_ATTENTION}.{part}_norm.weight", f"block_{{i}}/{part}_norm/scale")
            for part in "qk"
        ),
        *(
            Row(f"{_MLP}.{part}_proj.weight", f"block_{{i}}/{part}/kernel", dense)
            for part in ("gate", "up", "down")
        ),
        Row("model.norm.weight", "norm/scale"),
    )


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    vocabulary, width = shapes["model.embed_tokens.weight"]
    head_width = shapes[f"{_ATTENTION}.q_norm.weight".format(i=0)][0]
    queries, keys = (shapes[f"{_ATTENTION}.{part}_proj.weight".format(i=0)][0] for part in "qk")
    return {
        "width": width,
        "depth": count(f"{_BLOCK}.input_layernorm.weight", shapes),
        "num_heads": queries // head_width,
        "num_key_heads": keys // head_width,
        "head_width": head_width,
        "mlp_width": shapes[f"{_MLP}.up_proj.weight".format(i=0)][0],
        "vocabulary": vocabulary,
    }


def _inputs(network: Qwen3) -> tuple[jax.ShapeDtypeStruct]:
    del network
    return (jax.ShapeDtypeStruct((1, _TOKENS), jnp.int32),)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    for name, known in (("hidden_act", "silu"), ("attention_bias", False)):
        if config.get(name, known) != known:
            raise ValueError(f"its {name} is {config[name]!r}, not {known!r}")
    rotation = config.get("rope_parameters") or config
    if rotation.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise ValueError("its rotary positions are scaled, which is not known here")
    return {
        "width": int(config["hidden_size"]),
        "depth": int(config["num_hidden_layers"]),
        "num_heads": int(config["num_attention_heads"]),
        "num_key_heads": int(config["num_key_value_heads"]),
        "head_width": int(config["head_dim"]),
        "mlp_width": int(config["intermediate_size"]),
        "vocabulary": int(config["vocab_size"]),
        "max_period": float(rotation.get("rope_theta", 10_000.0)),
        "epsilon": float(config.get("rms_norm_eps", 1e-6)),
    }


def _config(network: Qwen3) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": network.width,
        "num_hidden_layers": network.depth,
        "num_attention_heads": network.num_heads,
        "num_key_value_heads": network.num_key_heads,
        "head_dim": network.head_width,
        "intermediate_size": network.mlp_width,
        "vocab_size": network.vocabulary,
        "rope_theta": network.max_period,
        "rms_norm_eps": network.epsilon,
        "hidden_act": "silu",
        "model_type": "qwen3",
        "tie_word_embeddings": True,
    }


FAMILY = Family(
    "Qwen3",
    Qwen3,
    SIZES,
    _table,
    _recognise,
    _inputs,
    unused=("lm_head.*",),
    config=Config("", {}, _settings, _config, weights="model"),
)
