"""The layout of unCLIP's prior in diffusers (`PriorTransformer`).

Queries, keys and values of a block are three layers, and one here.
"""

from collections.abc import Mapping
from typing import Any

from diffjax.conditions import Tokens
from diffjax.models.unclip.network import UnclipPrior
from diffjax.models.unclip.sizes import SIZES
from diffjax.pretrained.family import Config, Denoiser, Family, Published
from diffjax.pretrained.tables import Row, Table, count, layer, norm
from diffjax.pretrained.transforms import dense, merge, reshape

_BLOCK = "transformer_blocks.{i}"
_ADDED = 4
"""Tokens beside those of the text."""


def _of_qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{_BLOCK}.attn1.to_{part}.{kind}" for part in "qkv")


def _table(denoiser: Denoiser) -> Table:
    network, features = denoiser.network, denoiser.image_shape[-1]
    tokens, width = network.length + _ADDED, network.width
    return (
        *layer("time_embedding.linear_1", "conditioning/hidden"),
        *layer("time_embedding.linear_2", "conditioning/out"),
        *layer("proj_in", "embedding"),
        *layer("embedding_proj", "pooled"),
        *layer("encoder_hidden_states_proj", "text"),
        Row("positional_embedding", "positions", reshape((tokens, width), (1, tokens, width))),
        Row("prd_embedding", "query", reshape((width,), (1, 1, width))),
        *norm(f"{_BLOCK}.norm1", "block_{i}/norm1"),
        Row(_of_qkv("weight"), "block_{i}/attention/qkv/kernel", merge(3, dense)),
        Row(_of_qkv("bias"), "block_{i}/attention/qkv/bias", merge(3)),
        *layer(f"{_BLOCK}.attn1.to_out.0", "block_{i}/attention/out"),
        *norm(f"{_BLOCK}.norm3", "block_{i}/norm2"),
        *layer(f"{_BLOCK}.ff.net.0.proj", "block_{i}/up"),
        *layer(f"{_BLOCK}.ff.net.2", "block_{i}/down"),
        *norm("norm_out", "norm"),
        *layer("proj_to_clip_embeddings", "out"),
        Row("clip_mean", "mean", reshape((features,), (1, features))),
        Row("clip_std", "std", reshape((features,), (1, features))),
    )


def unclip_prior(features: int = 768, **settings: Any) -> Denoiser:
    """A prior with the kind of its condition.

    Args:
        features: the width of an embedding; 768 (CLIP L) or 1280 (bigG).
        **settings: settings of the network.
    """
    network = UnclipPrior(0, **settings)
    return Denoiser(network, (1, 1, features), Tokens(network.length, features, features))


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    _, tokens, width = shapes["positional_embedding"]
    return {
        "features": shapes["clip_mean"][1],
        "width": width,
        "depth": count(f"{_BLOCK}.norm1.weight", shapes),
        "length": tokens - _ADDED,
    }


_FIXED: Mapping[str, Any] = {
    "added_emb_type": "prd",
    "additional_embeddings": _ADDED,
    "clip_embed_dim": None,
    "dropout": 0.0,
    "embedding_proj_dim": None,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "norm_in_type": None,
    "time_embed_act_fn": "silu",
    "time_embed_dim": None,
}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    heads, width = int(config["num_attention_heads"]), int(config["attention_head_dim"])
    return {
        "features": int(config["embedding_dim"]),
        "width": heads * width,
        "depth": int(config["num_layers"]),
        "num_heads": heads,
        "length": int(config["num_embeddings"]),
    }


def _config(denoiser: Denoiser) -> dict[str, Any]:
    network = denoiser.network
    return {
        "num_attention_heads": network.num_heads,
        "attention_head_dim": network.width // network.num_heads,
        "num_layers": network.depth,
        "embedding_dim": denoiser.image_shape[-1],
        "num_embeddings": network.length,
    }


def _published(denoiser: Denoiser) -> Published:
    del denoiser
    return Published(
        objective="objective=ddpm_table,path=cosine_table,target=clean,noise_label=step",
        solver="ddpm",
        grid="linspace",
        num_steps=25,
        guidance_scale=4.0,
        codec="embeddings",
    )


FAMILY = Family(
    "unCLIP prior",
    unclip_prior,
    SIZES,
    _table,
    _recognise,
    lambda denoiser: denoiser.inputs,
    config=Config("PriorTransformer", _FIXED, _settings, _config),
    published=_published,
)
