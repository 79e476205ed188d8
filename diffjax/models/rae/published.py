"""The layouts of RAE's files: that of diffusers (`AutoencoderRAE`), with either version's names.

The encoder's names are those of transformers, which are others from its version 5 on.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.models.rae.network import DEVIATION, MEAN, RAE
from diffjax.models.rae.sizes import SIZES
from diffjax.pretrained.family import Config, Family
from diffjax.pretrained.tables import Row, Table, count, layer, norm
from diffjax.pretrained.transforms import (
    Transform,
    constant,
    conv,
    dense,
    each,
    keep,
    merge,
    squeeze,
)


class _Attention(NamedTuple):
    """Names of the layers of an encoder's attention."""

    qkv: tuple[str, str, str]
    out: str


_NEW = _Attention(("q_proj", "k_proj", "v_proj"), "o_proj")
_OLD = _Attention(("attention.query", "attention.key", "attention.value"), "output.dense")


def _rows(names: _Attention, network: RAE) -> Iterator[Row]:
    yield from _encoder(names, network.encoder_width)
    yield Row("decoder.trainable_cls_token", "decoder/class_token", squeeze(0, 1))
    yield from layer("decoder.decoder_embed", "decoder/embed")
    yield from layer("decoder.decoder_pred", "decoder/final")
    yield from norm("decoder.decoder_norm", "decoder/norm")
    theirs, ours = "decoder.decoder_layers.{i}", "decoder/block_{i}"
    yield from _qkv(theirs, ours, _Attention(("to_q", "to_k", "to_v"), "to_out.0"))
    yield from layer(f"{theirs}.intermediate.dense", f"{ours}/up")
    yield from layer(f"{theirs}.output.dense", f"{ours}/down")
    yield from norm(f"{theirs}.layernorm_before", f"{ours}/norm1")
    yield from norm(f"{theirs}.layernorm_after", f"{ours}/norm2")
    for name, value in (("encoder_mean", MEAN), ("encoder_std", DEVIATION)):
        yield Row(name, (), constant(lambda value=value: value.reshape(1, 3, 1, 1)))
    for name, ours, value in (("mean", "mean", 0.0), ("std", "deviation", 1.0)):
        if network.normalised:
            yield Row(f"_latents_{name}", f"latents_{ours}", _channels_last)
        else:
            none = constant(lambda value=value: np.full(1, value, np.float32))
            yield Row(f"_latents_{name}", (), none)


def _encoder(names: _Attention, width: int) -> Iterator[Row]:
    start = "encoder.embeddings"
    yield Row(f"{start}.cls_token", "encoder/class_token", squeeze(0, 1))
    yield Row(f"{start}.position_embeddings", "encoder/positions", squeeze(0))
    yield Row(f"{start}.register_tokens", "encoder/registers", squeeze(0))
    # It hides patches in DINOv2's training.
    nothing = np.zeros((1, width), np.float32)
    yield Row(f"{start}.mask_token", (), Transform(lambda _: (), lambda _: (nothing,)))
    yield from layer(f"{start}.patch_embeddings.projection", "encoder/patches", conv)
    theirs, ours = "encoder.encoder.layer.{i}", "encoder/block_{i}"
    yield from _qkv(theirs, ours, names)
    yield from layer(f"{theirs}.mlp.fc1", f"{ours}/up")
    yield from layer(f"{theirs}.mlp.fc2", f"{ours}/down")
    yield from norm(f"{theirs}.norm{{n}}", f"{ours}/norm{{n}}")
    yield Row(f"{theirs}.layer_scale{{n}}.lambda1", f"{ours}/scale{{n}}")


def _qkv(theirs: str, ours: str, names: _Attention) -> Iterator[Row]:
    attention, here = f"{theirs}.attention", f"{ours}/attention"
    for kind, name, how in (("weight", "kernel", dense), ("bias", "bias", keep)):
        parts = tuple(f"{attention}.{part}.{kind}" for part in names.qkv)
        yield Row(parts, f"{here}/qkv/{name}", merge(3, how))
    yield from layer(f"{attention}.{names.out}", f"{here}/out")


_channels_last = each(lambda x: x.transpose(1, 2, 0), lambda x: x.transpose(2, 0, 1))


def _inputs(network: RAE) -> tuple[jax.ShapeDtypeStruct]:
    side = network.encoder_side
    return (jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "encoder_width": int(config["encoder_hidden_size"]),
        "encoder_depth": int(config["encoder_num_hidden_layers"]),
        "width": int(config["decoder_hidden_size"]),
        "depth": int(config["decoder_num_hidden_layers"]),
        "num_heads": int(config["decoder_num_attention_heads"]),
        "mlp_width": int(config["decoder_intermediate_size"]),
        "patch_size": int(config["patch_size"]),
        "encoder_side": int(config["encoder_input_size"]),
        "normalised": config.get("latents_mean") is not None,
    }


def _config(network: RAE) -> dict[str, Any]:
    entries = {
        "decoder_hidden_size": network.width,
        "decoder_intermediate_size": network.mlp_width,
        "decoder_num_attention_heads": network.num_heads,
        "decoder_num_hidden_layers": network.depth,
        "encoder_hidden_size": network.encoder_width,
        "encoder_input_size": network.encoder_side,
        "encoder_num_hidden_layers": network.encoder_depth,
        "image_size": network.image_side,
        "patch_size": network.patch_size,
    }
    if not network.normalised:
        return entries
    # diffusers takes the shape of the statistics from here, and their numbers from the weights.
    shape = (network.encoder_width, network.side, network.side)
    return {
        **entries,
        "latents_mean": np.zeros(shape).tolist(),
        "latents_std": np.ones(shape).tolist(),
    }


_FIXED = {
    "encoder_patch_size": 14,
    "encoder_type": "dinov2",
    "num_channels": 3,
    "reshape_to_2d": True,
    "scaling_factor": 1.0,
}
_OF_DIFFUSERS = Config(
    "AutoencoderRAE",
    _FIXED,
    _settings,
    _config,
    beside={"noise_tau": 0.0, "use_encoder_loss": False},
)


def _family(name: str, names: _Attention) -> Family:
    def table(network: RAE) -> Table:
        return tuple(_rows(names, network))

    def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        query = f"encoder.encoder.layer.{{i}}.attention.{names.qkv[0]}.weight"
        mean = shapes["_latents_mean"]
        positions, pixels = (
            shapes["encoder.embeddings.position_embeddings"][1] - 1,
            shapes["decoder.decoder_pred.weight"][0] // 3,
        )
        return {
            "encoder_width": shapes[query.format(i=0)][0],
            "encoder_depth": count(query, shapes),
            "width": shapes["decoder.decoder_embed.weight"][0],
            "depth": count("decoder.decoder_layers.{i}.attention.to_q.weight", shapes),
            "mlp_width": shapes["decoder.decoder_layers.0.intermediate.dense.weight"][0],
            "patch_size": round(pixels**0.5),
            "normalised": len(mean) == 3,
            "grid": round(positions**0.5),
            **({"encoder_side": 14 * mean[-1]} if len(mean) == 3 else {}),
        }

    return Family(name, RAE, SIZES, table, recognise, _inputs, config=_OF_DIFFUSERS)


FAMILY = _family("RAE", _NEW)
OLD = _family("RAE of transformers 4", _OLD)
LAYOUTS: Mapping[str, Family] = {
    "encoder.encoder.layer.0.attention.attention.query.weight": OLD,
    "encoder.encoder.layer.0.attention.q_proj.weight": FAMILY,
}
"""The families of all layouts, by a tensor that is in the files of each alone."""
