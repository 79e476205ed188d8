"""The layouts of transformers (`BertModel`), which sentence-transformers has too, and of M-CLIP.

M-CLIP (`MultilingualCLIP` of Kandinsky 2.1) is an XLM-RoBERTa, `transformer`, with a projection.

Weights of queries, keys and values are three matrices, and one here. The layer of BERT's own pooled
vector, `pooler`, is left out.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.models.bert.network import Bert, MultilingualCLIP
from diffjax.models.bert.sizes import MCLIP_SIZES, SIZES
from diffjax.pretrained.family import Config, Family
from diffjax.pretrained.tables import Row, count, layer, norm, within
from diffjax.pretrained.transforms import dense, merge

_EMBEDDINGS = "embeddings"
_LAYER = "encoder.layer.{i}"


def _of_qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{_LAYER}.attention.self.{part}.{kind}" for part in ("query", "key", "value"))


TABLE = (
    Row(f"{_EMBEDDINGS}.word_embeddings.weight", "tokens/embedding"),
    Row(f"{_EMBEDDINGS}.position_embeddings.weight", "positions"),
    Row(f"{_EMBEDDINGS}.token_type_embeddings.weight", "segments"),
    *norm(f"{_EMBEDDINGS}.LayerNorm", "norm"),
    Row(_of_qkv("weight"), "block_{i}/attention/qkv/kernel", merge(3, dense)),
    Row(_of_qkv("bias"), "block_{i}/attention/qkv/bias", merge(3)),
    *layer(f"{_LAYER}.attention.output.dense", "block_{i}/attention/out"),
    *norm(f"{_LAYER}.attention.output.LayerNorm", "block_{i}/norm1"),
    *layer(f"{_LAYER}.intermediate.dense", "block_{i}/up"),
    *layer(f"{_LAYER}.output.dense", "block_{i}/down"),
    *norm(f"{_LAYER}.output.LayerNorm", "block_{i}/norm2"),
)


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    vocabulary, width = shapes[f"{_EMBEDDINGS}.word_embeddings.weight"]
    mlp_width = shapes[f"{_LAYER}.intermediate.dense.weight".format(i=0)][0]
    return {
        "width": width,
        "depth": count(f"{_LAYER}.output.dense.weight", shapes),
        "vocabulary": vocabulary,
        "length": shapes[f"{_EMBEDDINGS}.position_embeddings.weight"][0],
        "mlp_width": None if mlp_width == 4 * width else mlp_width,
        "num_segments": shapes[f"{_EMBEDDINGS}.token_type_embeddings.weight"][0],
    }


def _inputs(network: Bert) -> tuple[jax.ShapeDtypeStruct]:
    return (jax.ShapeDtypeStruct((1, network.length), jnp.int32),)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    width, wide = int(config["hidden_size"]), int(config["intermediate_size"])
    return {
        "width": width,
        "depth": int(config["num_hidden_layers"]),
        "num_heads": int(config["num_attention_heads"]),
        "vocabulary": int(config["vocab_size"]),
        "length": int(config["max_position_embeddings"]),
        "mlp_width": None if wide == 4 * width else wide,
        "num_segments": int(config.get("type_vocab_size", 2)),
        "epsilon": float(config.get("layer_norm_eps", 1e-12)),
    }


def _config(network: Bert) -> dict[str, Any]:
    return {
        "architectures": ["BertModel"],
        "hidden_size": network.width,
        "intermediate_size": network.mlp_width or 4 * network.width,
        "num_hidden_layers": network.depth,
        "num_attention_heads": network.num_heads,
        "vocab_size": network.vocabulary,
        "max_position_embeddings": network.length,
        "type_vocab_size": network.num_segments,
        "layer_norm_eps": network.epsilon,
        "pad_token_id": 0,
    }


_PART = "transformer"
_MCLIP_TABLE = (*within(TABLE, _PART), *layer("LinearTransformation", "projection"))
_ROBERTA = 2
"""The position of a first token: after that of padding, which has its id, 1."""


def _recognise_mclip(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    inner = {name.removeprefix(f"{_PART}."): x for name, x in shapes.items() if _PART in name}
    found = _recognise(inner)
    features = shapes["LinearTransformation.weight"][0]
    return {**found, "length": found["length"] - _ROBERTA, "num_features": features}


def _settings_of_mclip(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("pad_token_id", 1) != _ROBERTA - 1:
        raise ValueError(f"its pad_token_id is {config['pad_token_id']}, and 1 is known")
    found = _settings(config)
    features = int(config.get("numDims", 768))
    return {**found, "length": found["length"] - _ROBERTA, "num_features": features}


def _config_of_mclip(network: Bert) -> dict[str, Any]:
    return {
        **_config(network),
        "architectures": ["MultilingualCLIP"],
        "max_position_embeddings": network.length + network.first_position,
        "numDims": network.num_features,
        "transformerDimensions": network.width,
        "transformerDimSize": network.width,
        "imageDimSize": network.num_features,
        "pad_token_id": _ROBERTA - 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


_FIXED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}

FAMILY = Family(
    "BERT",
    Bert,
    SIZES,
    lambda _: TABLE,
    _recognise,
    _inputs,
    unused=("pooler.*", f"{_EMBEDDINGS}.position_ids"),
    config=Config("", _FIXED, _settings, _config, weights="model"),
)
MCLIP = Family(
    "M-CLIP",
    MultilingualCLIP,
    MCLIP_SIZES,
    lambda _: _MCLIP_TABLE,
    _recognise_mclip,
    _inputs,
    unused=(f"{_PART}.pooler.*", f"{_PART}.{_EMBEDDINGS}.position_ids"),
    config=Config(
        "",
        {**_FIXED, "model_type": "M-CLIP"},
        _settings_of_mclip,
        _config_of_mclip,
        weights="model",
    ),
)
