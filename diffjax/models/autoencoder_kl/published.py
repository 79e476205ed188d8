"""The layouts of the published files: that of diffusers, its older one, and that of LDM.

- diffusers (`AutoencoderKL`) numbers the decoder's levels from the coarsest one. Its older files
  have other names in the attention.
- LDM (CompVis/latent-diffusion), also the file of FLUX.1, numbers them from the finest one, as
  here; queries, keys and values are convolutions of one pixel. A file of a whole model has the
  autoencoder under a prefix.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.models.autoencoder_kl.network import AutoencoderKL
from diffjax.models.autoencoder_kl.sizes import SIZES
from diffjax.pretrained.family import Config, Family
from diffjax.pretrained.files import read_state_dict
from diffjax.pretrained.tables import Row, Table, count, layer, norm
from diffjax.pretrained.transforms import Transform, conv, dense, keep, merge, squeeze, then

PREFIXES = ("first_stage_model.", "vae.")
"""What names of the autoencoder begin with in files of whole models."""

_pointwise = then(squeeze(2, 3), dense)


class _Attention(NamedTuple):
    """Names of the layers of attention: the norm, those of queries, keys and values, the output."""

    norm: str
    qkv: tuple[str, str, str]
    out: str
    kernel: Transform


class _Layout(NamedTuple):
    """Names of a layout; `{i}` is a level from the finest one, `{up}` one from the coarsest."""

    block: str
    down: str
    up: str
    downsample: str
    upsample: str
    middle: tuple[str, str, str]
    attention: _Attention
    skip: str
    final_norm: str


_LDM = _Layout(
    block="block",
    down="encoder.down.{i}",
    up="decoder.up.{i}",
    downsample="downsample.conv",
    upsample="upsample.conv",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    attention=_Attention("norm", ("q", "k", "v"), "proj_out", _pointwise),
    skip="nin_shortcut",
    final_norm="norm_out",
)
_DIFFUSERS = _Layout(
    block="resnets",
    down="encoder.down_blocks.{i}",
    up="decoder.up_blocks.{up}",
    downsample="downsamplers.0.conv",
    upsample="upsamplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    attention=_Attention("group_norm", ("to_q", "to_k", "to_v"), "to_out.0", dense),
    skip="conv_shortcut",
    final_norm="conv_norm_out",
)
_OLD_DIFFUSERS = _DIFFUSERS._replace(
    attention=_Attention("group_norm", ("query", "key", "value"), "proj_attn", dense)
)


def _rows(names: _Layout, network: AutoencoderKL) -> Iterator[Row]:
    yield from layer("quant_conv", "quant_conv", _pointwise)
    yield from layer("post_quant_conv", "post_quant_conv", _pointwise)
    for part in ("encoder", "decoder"):
        yield from layer(f"{part}.conv_in", f"{part}/conv_in", conv)
        yield from norm(f"{part}.{names.final_norm}", f"{part}/final_norm")
        yield from layer(f"{part}.conv_out", f"{part}/final_conv", conv)
        first, attention, second = (f"{part}.{name}" for name in names.middle)
        yield from _block(first, f"{part}/middle_0", names.skip)
        yield from _attention(attention, f"{part}/middle_attention", names.attention)
        yield from _block(second, f"{part}/middle_1", names.skip)
    for i in range(len(network.channels)):
        level = {"i": i, "up": len(network.channels) - 1 - i}
        down, up = names.down.format(**level), names.up.format(**level)
        yield from _block(f"{down}.{names.block}.{{j}}", f"encoder/down_{i}_{{j}}", names.skip)
        yield from _block(f"{up}.{names.block}.{{j}}", f"decoder/up_{i}_{{j}}", names.skip)
        yield from layer(f"{down}.{names.downsample}", f"encoder/down_{i}_resample", conv)
        yield from layer(f"{up}.{names.upsample}", f"decoder/up_{i}_resample", conv)


def _block(theirs: str, ours: str, skip: str) -> Iterator[Row]:
    for n in (1, 2):
        yield from norm(f"{theirs}.norm{n}", f"{ours}/norm_{n}")
        yield from layer(f"{theirs}.conv{n}", f"{ours}/conv_{n}", conv)
    yield from layer(f"{theirs}.{skip}", f"{ours}/skip", _pointwise)


def _attention(theirs: str, ours: str, names: _Attention) -> Iterator[Row]:
    yield from norm(f"{theirs}.{names.norm}", f"{ours}/norm")
    for kind, name, how in (("weight", "kernel", names.kernel), ("bias", "bias", keep)):
        each = tuple(f"{theirs}.{part}.{kind}" for part in names.qkv)
        yield Row(each, f"{ours}/attention/qkv/{name}", merge(3, how))
    yield from layer(f"{theirs}.{names.out}", f"{ours}/attention/out", names.kernel)


def _recogniser(
    names: _Layout,
) -> Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, Any]]:
    def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        # In all files of this layout alone, so that its absence names the layout.
        _ = shapes[f"encoder.{names.middle[1]}.{names.attention.qkv[0]}.weight"]
        first = f"{names.down}.{names.block}.{{j}}.conv1.weight"
        levels = count(first.replace("{j}", "0"), shapes)
        return {
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "quant_convs": "quant_conv.weight" in shapes,
            "channels": tuple(shapes[first.format(i=i, j=0)][0] for i in range(levels)),
            "num_res_blocks": count(first.replace("{i}", "0"), shapes),
            "image_channels": shapes["encoder.conv_in.weight"][1],
        }

    return recognise


def _inputs(network: AutoencoderKL) -> tuple[jax.ShapeDtypeStruct]:
    shape = (1, network.scale, network.scale, network.image_channels)
    return (jax.ShapeDtypeStruct(shape, jnp.float32),)


def _family(name: str, names: _Layout) -> Family:
    def table(network: AutoencoderKL) -> Table:
        return tuple(_rows(names, network))

    return Family(name, AutoencoderKL, SIZES, table, _recogniser(names), _inputs)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "latent_channels": int(config["latent_channels"]),
        "quant_convs": bool(config.get("use_quant_conv", True)),
        "channels": tuple(map(int, config["block_out_channels"])),
        "num_res_blocks": int(config["layers_per_block"]),
        "num_groups": int(config["norm_num_groups"]),
        "image_channels": int(config["in_channels"]),
    }


def _config(network: AutoencoderKL) -> dict[str, Any]:
    levels = len(network.channels)
    return {
        "block_out_channels": list(network.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": network.image_channels,
        "latent_channels": network.latent_channels,
        "layers_per_block": network.num_res_blocks,
        "norm_num_groups": network.num_groups,
        "out_channels": network.image_channels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": network.quant_convs,
        "use_quant_conv": network.quant_convs,
    }


_FIXED = {"act_fn": "silu", "mid_block_add_attention": True}
_SCALING = {"scaling_factor": 0.18215, "shift_factor": None}
_OF_DIFFUSERS = Config("AutoencoderKL", _FIXED, _settings, _config, beside=_SCALING)

FAMILY = replace(_family("AutoencoderKL", _DIFFUSERS), config=_OF_DIFFUSERS)
OLD_DIFFUSERS = replace(
    _family("AutoencoderKL of old diffusers", _OLD_DIFFUSERS), config=_OF_DIFFUSERS
)
LDM = replace(
    _family("AutoencoderKL of LDM", _LDM),
    # Of its training: the discriminator, the network of the perceptual distance, averages.
    unused=("loss.*", "model_ema.*"),
)


def layout_of(state: Mapping[str, Any]) -> Family:
    """The layout that published tensors are in, by their names; `FAMILY` where none is.

    Example:
        >>> layout_of({"encoder.mid.attn_1.q.weight": None}).name
        'AutoencoderKL of LDM'
    """
    attention = {"mid.attn_1.q": LDM, "mid_block.attentions.0.query": OLD_DIFFUSERS}
    for name, family in attention.items():
        if f"encoder.{name}.weight" in state:
            return family
    return FAMILY


def without_prefix(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tensors of the autoencoder alone, of a file that may be of a whole model.

    Example:
        >>> list(without_prefix({"vae.encoder.x": 1, "model.y": 2}))
        ['encoder.x']
    """
    for prefix in PREFIXES:
        found = {x.removeprefix(prefix): state[x] for x in state if x.startswith(prefix)}
        if found:
            return found
    return state


def read(path: str | Path, network: Any = None) -> tuple[Any, Any]:
    """Reads a published file of any of the layouts; see `Family.read`.

    Args:
        path: of the file, of torch or safetensors.
        network: the network; by default it is recognised by the shapes, with 32 groups.

    Returns:
        The network and its parameters.

    Raises:
        UserError: the file can't be read, or is of another network.
    """
    state = without_prefix(read_state_dict(path))
    family = layout_of(state)
    if network is None:
        network = family.network_of(state, str(path))
    return network, family.to_ours(state, network, str(path))
