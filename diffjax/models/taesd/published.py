"""The layouts of TAESD's files: places in `torch.nn.Sequential`s.

The authors have a file for each half, `NAME_encoder.pth` and `NAME_decoder.pth`; diffusers
(`AutoencoderTiny`) has one for both.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.models.taesd.network import (
    SCALE,
    WIDTH,
    AutoencoderTiny,
    TAESDDecoder,
    TAESDEncoder,
)
from diffjax.models.taesd.sizes import DECODERS, ENCODERS, TINIES
from diffjax.pretrained.family import Config, Family
from diffjax.pretrained.tables import Row
from diffjax.pretrained.transforms import conv


def _rows(theirs: str, ours: str) -> tuple[Row, ...]:
    """The rows of a layer, or of all by `{i}`."""
    return (
        Row(f"{theirs}.weight", f"{ours}/kernel", conv),
        Row(f"{theirs}.bias", f"{ours}/bias"),
        Row(f"{theirs}.conv.{{j}}.weight", f"{ours}/conv_{{j}}/kernel", conv),
        Row(f"{theirs}.conv.{{j}}.bias", f"{ours}/conv_{{j}}/bias"),
        Row(f"{theirs}.pool.0.weight", f"{ours}/pool_in/kernel", conv),
        Row(f"{theirs}.pool.1.weight", f"{ours}/norm/scale"),
        Row(f"{theirs}.pool.1.bias", f"{ours}/norm/bias"),
        Row(f"{theirs}.pool.3.weight", f"{ours}/pool_out/kernel", conv),
    )


TABLE = _rows("{i}", "layer_{i}")
# There the clamp is no layer of the decoder.
_TINY = (
    *_rows("encoder.layers.{i}", "encoder/layer_{i}"),
    *(row for i in range(1, 20) for row in _rows(f"decoder.layers.{i - 1}", f"decoder/layer_{i}")),
)


def _encoder_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        "latent_channels": shapes["14.weight"][0],
        **({"pooled": True} if "11.pool.0.weight" in shapes else {}),
    }


def _decoder_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        "latent_channels": shapes["1.weight"][1],
        **({"pooled": True} if "3.pool.0.weight" in shapes else {}),
    }


def _image(network: TAESDEncoder | AutoencoderTiny) -> tuple[jax.ShapeDtypeStruct]:
    del network
    return (jax.ShapeDtypeStruct((1, SCALE, SCALE, 3), jnp.float32),)


def _latent(network: TAESDDecoder) -> tuple[jax.ShapeDtypeStruct]:
    return (jax.ShapeDtypeStruct((1, 1, 1, network.latent_channels), jnp.float32),)


ENCODER = Family("TAESD encoder", TAESDEncoder, ENCODERS, lambda _: TABLE, _encoder_of, _image)
DECODER = Family("TAESD decoder", TAESDDecoder, DECODERS, lambda _: TABLE, _decoder_of, _latent)


def _tiny_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {"latent_channels": shapes["encoder.layers.14.weight"][0]}


def _tiny_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"latent_channels": int(config["latent_channels"])}


def _tiny_config(network: AutoencoderTiny) -> dict[str, Any]:
    return {"latent_channels": network.latent_channels}


_FIXED = {
    "act_fn": "relu",
    "decoder_block_out_channels": [WIDTH] * 4,
    "encoder_block_out_channels": [WIDTH] * 4,
    "in_channels": 3,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}
_TINY_NAME = "AutoencoderTiny"
TINY = Family(
    _TINY_NAME,
    AutoencoderTiny,
    TINIES,
    lambda _: _TINY,
    _tiny_of,
    _image,
    config=Config(_TINY_NAME, _FIXED, _tiny_settings, _tiny_config),
)
