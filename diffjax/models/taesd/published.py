"""The layouts of the published files: that of the authors, and that of diffusers.

- The authors' `NAME_encoder.pth` and `NAME_decoder.pth` number the places in a
  `torch.nn.Sequential` each. A folder of the two is read as one (`diffjax.pretrained.folders`).
- diffusers (`AutoencoderTiny`) has both in one file. Its decoder has no place for the clamp at the
  start, and it has no blocks that normalise over all positions (`pooled`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.errors import UserError
from diffjax.models.taesd.network import SCALE, TAESD, WIDTH, TAESDDecoder, TAESDEncoder
from diffjax.models.taesd.sizes import BOTH, DECODERS, ENCODERS, OF_DIFFUSERS
from diffjax.pretrained.family import Config, Family
from diffjax.pretrained.tables import Row
from diffjax.pretrained.transforms import Transform, conv, keep

_PARAMETERS: Sequence[tuple[str, str, Transform]] = (
    ("{i}.weight", "layer_{i}/kernel", conv),
    ("{i}.bias", "layer_{i}/bias", keep),
    ("{i}.conv.{j}.weight", "layer_{i}/conv_{j}/kernel", conv),
    ("{i}.conv.{j}.bias", "layer_{i}/conv_{j}/bias", keep),
    ("{i}.pool.0.weight", "layer_{i}/pool_in/kernel", conv),
    ("{i}.pool.1.weight", "layer_{i}/norm/scale", keep),
    ("{i}.pool.1.bias", "layer_{i}/norm/bias", keep),
    ("{i}.pool.3.weight", "layer_{i}/pool_out/kernel", conv),
)
"""Their names, ours, and the changes of layout."""
TABLE = tuple(Row(*each) for each in _PARAMETERS)


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


def _image(network: TAESDEncoder | TAESD) -> tuple[jax.ShapeDtypeStruct]:
    del network
    return (jax.ShapeDtypeStruct((1, SCALE, SCALE, 3), jnp.float32),)


def _latent(network: TAESDDecoder) -> tuple[jax.ShapeDtypeStruct]:
    return (jax.ShapeDtypeStruct((1, 1, 1, network.latent_channels), jnp.float32),)


ENCODER = Family("TAESD encoder", TAESDEncoder, ENCODERS, lambda _: TABLE, _encoder_of, _image)
DECODER = Family("TAESD decoder", TAESDDecoder, DECODERS, lambda _: TABLE, _decoder_of, _latent)

_NUM_PLACES = 20


def _table_of_both(network: TAESD) -> tuple[Row, ...]:
    del network
    return tuple(
        Row(f"{part}.{theirs}", f"{part}/{ours}", how)
        for part in ("encoder", "decoder")
        for theirs, ours, how in _PARAMETERS
    )


def _both_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    _ = shapes["decoder.1.weight"]
    return _encoder_of(_within(shapes, "encoder."))


def _within(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {x.removeprefix(prefix): shapes[x] for x in shapes if x.startswith(prefix)}


FAMILY = Family(
    "TAESD", TAESD, BOTH, _table_of_both, _both_of, _image, files=("encoder", "decoder")
)
"""The two files as one, with names that begin with `encoder.` and `decoder.`."""


def _table_of_diffusers(network: TAESD) -> tuple[Row, ...]:
    del network
    return tuple(
        Row(
            f"{part}.layers.{theirs.replace('{i}', str(place - less))}",
            f"{part}/{ours.replace('{i}', str(place))}",
            how,
        )
        for part, less in (("encoder", 0), ("decoder", 1))
        for place in range(less, _NUM_PLACES)
        for theirs, ours, how in _PARAMETERS
    )


def _diffusers_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    _ = shapes["decoder.layers.0.weight"]
    return _encoder_of(_within(shapes, "encoder.layers."))


def _config(network: TAESD) -> dict[str, Any]:
    if network.pooled:
        raise UserError("AutoencoderTiny has no blocks that normalise over all positions (pooled)")
    return {"latent_channels": network.latent_channels}


_FIXED = {
    "act_fn": "relu",
    "decoder_block_out_channels": [WIDTH] * 4,
    "encoder_block_out_channels": [WIDTH] * 4,
    "in_channels": 3,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}

DIFFUSERS = Family(
    "TAESD of diffusers",
    TAESD,
    OF_DIFFUSERS,
    _table_of_diffusers,
    _diffusers_of,
    _image,
    config=Config(
        "AutoencoderTiny",
        _FIXED,
        lambda config: {"latent_channels": int(config["latent_channels"])},
        _config,
        beside={"scaling_factor": 1.0, "shift_factor": 0.0},
    ),
)
