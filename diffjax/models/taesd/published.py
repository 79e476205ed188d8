"""The layout of `NAME_encoder.pth` and `NAME_decoder.pth`: places in `torch.nn.Sequential`s."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.models.taesd.network import SCALE, TAESDDecoder, TAESDEncoder
from diffjax.models.taesd.sizes import DECODERS, ENCODERS
from diffjax.pretrained.family import Family
from diffjax.pretrained.tables import Row
from diffjax.pretrained.transforms import conv

TABLE = (
    Row("{i}.weight", "layer_{i}/kernel", conv),
    Row("{i}.bias", "layer_{i}/bias"),
    Row("{i}.conv.{j}.weight", "layer_{i}/conv_{j}/kernel", conv),
    Row("{i}.conv.{j}.bias", "layer_{i}/conv_{j}/bias"),
    Row("{i}.pool.0.weight", "layer_{i}/pool_in/kernel", conv),
    Row("{i}.pool.1.weight", "layer_{i}/norm/scale"),
    Row("{i}.pool.1.bias", "layer_{i}/norm/bias"),
    Row("{i}.pool.3.weight", "layer_{i}/pool_out/kernel", conv),
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


def _image(network: TAESDEncoder) -> tuple[jax.ShapeDtypeStruct]:
    del network
    return (jax.ShapeDtypeStruct((1, SCALE, SCALE, 3), jnp.float32),)


def _latent(network: TAESDDecoder) -> tuple[jax.ShapeDtypeStruct]:
    return (jax.ShapeDtypeStruct((1, 1, 1, network.latent_channels), jnp.float32),)


ENCODER = Family("TAESD encoder", TAESDEncoder, ENCODERS, lambda _: TABLE, _encoder_of, _image)
DECODER = Family("TAESD decoder", TAESDDecoder, DECODERS, lambda _: TABLE, _decoder_of, _latent)
