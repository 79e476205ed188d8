"""The layout of transformers (`T5EncoderModel`, and the encoder in files of all of T5).

The table of distances belongs to the first block there, and all blocks use it. Queries, keys and
values are three matrices, and one here.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.models.t5.network import T5Encoder
from diffjax.models.t5.sizes import SIZES
from diffjax.pretrained.family import Config, Family
from diffjax.pretrained.tables import Row, Table, count
from diffjax.pretrained.transforms import dense, merge

_TOKENS = 512  # what Imagen's successors read at most
_BLOCK = "encoder.block.{i}"
_DISTANCES = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_QKV = tuple(f"{_BLOCK}.layer.0.SelfAttention.{part}.weight" for part in "qkv")
_MLP = f"{_BLOCK}.layer.1.DenseReluDense"
_ACTIVATIONS = {"gated-gelu": True, "relu": False}


def _table(network: T5Encoder) -> Table:
    names = {"gate": "wi_0", "up": "wi_1"} if network.gated else {"up": "wi"}
    return (
        Row("shared.weight", "tokens/embedding"),
        Row(_DISTANCES, "distances"),
        Row(f"{_BLOCK}.layer.0.layer_norm.weight", "block_{i}/norm1/scale"),
        Row(_QKV, "block_{i}/qkv/kernel", merge(3, dense)),
        Row(f"{_BLOCK}.layer.0.SelfAttention.o.weight", "block_{i}/out/kernel", dense),
        Row(f"{_BLOCK}.layer.1.layer_norm.weight", "block_{i}/norm2/scale"),
        *(
            Row(f"{_MLP}.{theirs}.weight", f"block_{{i}}/{ours}/kernel", dense)
            for ours, theirs in names.items()
        ),
        Row(f"{_MLP}.wo.weight", "block_{i}/down/kernel", dense),
        Row("encoder.final_layer_norm.weight", "norm/scale"),
    )


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    vocabulary, width = shapes["shared.weight"]
    num_buckets, num_heads = shapes[_DISTANCES]
    gated = f"{_MLP}.wi_0.weight".format(i=0) in shapes
    up = f"{_MLP}.{'wi_1' if gated else 'wi'}.weight".format(i=0)
    return {
        "width": width,
        "depth": count(f"{_BLOCK}.layer.0.layer_norm.weight", shapes),
        "num_heads": num_heads,
        "mlp_width": shapes[up][0],
        "gated": gated,
        "head_width": shapes[_QKV[0].format(i=0)][0] // num_heads,
        "vocabulary": vocabulary,
        "num_buckets": num_buckets,
    }


def _inputs(network: T5Encoder) -> tuple[jax.ShapeDtypeStruct]:
    del network
    return (jax.ShapeDtypeStruct((1, _TOKENS), jnp.int32),)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    activation = config.get("feed_forward_proj", "relu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"its feed_forward_proj is {activation!r}, not {', '.join(_ACTIVATIONS)}")
    return {
        "width": int(config["d_model"]),
        "depth": int(config["num_layers"]),
        "num_heads": int(config["num_heads"]),
        "mlp_width": int(config["d_ff"]),
        "gated": _ACTIVATIONS[activation],
        "head_width": int(config["d_kv"]),
        "vocabulary": int(config["vocab_size"]),
        "num_buckets": int(config.get("relative_attention_num_buckets", 32)),
        "max_distance": int(config.get("relative_attention_max_distance", 128)),
        "epsilon": float(config.get("layer_norm_epsilon", 1e-6)),
    }


def _config(network: T5Encoder) -> dict[str, Any]:
    names = {gated: name for name, gated in _ACTIVATIONS.items()}
    return {
        "architectures": ["T5EncoderModel"],
        "d_model": network.width,
        "num_layers": network.depth,
        "num_heads": network.num_heads,
        "d_ff": network.mlp_width,
        "feed_forward_proj": names[network.gated],
        "d_kv": network.head_width,
        "vocab_size": network.vocabulary,
        "relative_attention_num_buckets": network.num_buckets,
        "relative_attention_max_distance": network.max_distance,
        "layer_norm_epsilon": network.epsilon,
        "model_type": "t5",
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


FAMILY = Family(
    "T5 encoder",
    T5Encoder,
    SIZES,
    _table,
    _recognise,
    _inputs,
    # The same as `shared`, and the half that writes texts.
    unused=("encoder.embed_tokens.weight", "decoder.*", "lm_head.*"),
    config=Config("", {}, _settings, _config, weights="model"),
)
