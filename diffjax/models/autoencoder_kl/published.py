"""The layouts of the published files: that of diffusers, its older one, and that of LDM.

- diffusers (`AutoencoderKL`) numbers the decoder's levels from the coarsest one. Its older files
  have other names in the attention.
- LDM (CompVis/latent-diffusion), also the file of FLUX.1, numbers them from the finest one, as
  here; queries, keys and values are convolutions of one pixel. A file of a whole model has the
  autoencoder under a prefix.
- The authors' file of FLUX.2 is as LDM's, with the affine maps within encoder and decoder.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.models.autoencoder_kl.network import AutoencoderKL, AutoencoderKLFlux2
from diffjax.models.autoencoder_kl.sizes import FLUX2_SIZES, SIZES
from diffjax.pretrained.family import Config, Family
from diffjax.pretrained.files import read_state_dict
from diffjax.pretrained.tables import Row, Table, count, layer, norm
from diffjax.pretrained.transforms import Transform, conv, dense, keep, merge, squeeze, then

PREFIXES = ("first_stage_model.", "vae.")
"""What names of the autoencoder begin with in files of whole models."""


def has_autoencoder(names: Iterable[str]) -> bool:
    """Whether names of tensors are those of a whole model with its autoencoder.

    Example:
        >>> has_autoencoder(["model.diffusion_model.out.2.bias", "first_stage_model.decoder.x"])
        True
    """
    return any(name.startswith(f"{prefix}decoder.") for name in names for prefix in PREFIXES)


_pointwise = then(squeeze(2, 3), dense)


class _Attention(NamedTuple):
    """Names of the layers of attention.

    They are its norm, plain or spatial, those of queries, keys and values, and the output.
    """

    norm: str
    spatial_norm: str
    qkv: tuple[str, str, str]
    out: str
    kernel: Transform


class Layout(NamedTuple):
    """Names of a layout; `{i}` is a level from the finest one, `{up}` one from the coarsest."""

    block: str
    down: str
    up: str
    downsample: str
    upsample: str
    middle: tuple[str, str, str]
    attention: _Attention
    level_attention: str
    skip: str
    final_norm: str
    quant_convs: tuple[str, str] = ("quant_conv", "post_quant_conv")


AUTHORS = Layout(
    block="block",
    down="encoder.down.{i}",
    up="decoder.up.{i}",
    downsample="downsample.conv",
    upsample="upsample.conv",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    attention=_Attention("norm", "norm", ("q", "k", "v"), "proj_out", _pointwise),
    level_attention="attn",
    skip="nin_shortcut",
    final_norm="norm_out",
)
DIFFUSERS = Layout(
    block="resnets",
    down="encoder.down_blocks.{i}",
    up="decoder.up_blocks.{up}",
    downsample="downsamplers.0.conv",
    upsample="upsamplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    attention=_Attention("group_norm", "spatial_norm", ("to_q", "to_k", "to_v"), "to_out.0", dense),
    level_attention="attentions",
    skip="conv_shortcut",
    final_norm="conv_norm_out",
)
_OLD_DIFFUSERS = DIFFUSERS._replace(
    attention=_Attention(
        "group_norm", "spatial_norm", ("query", "key", "value"), "proj_attn", dense
    )
)
_FLUX2 = AUTHORS._replace(quant_convs=("encoder.quant_conv", "decoder.post_quant_conv"))


def rows(names: Layout, network: Any) -> Iterator[Row]:
    """The rows of encoder, decoder and what is between, in a layout."""
    for theirs, ours in zip(names.quant_convs, ("quant_conv", "post_quant_conv"), strict=True):
        yield from layer(theirs, ours, _pointwise)
    yield Row("bn.running_mean", "statistics/mean")
    yield Row("bn.running_var", "statistics/variance")
    for part in ("encoder", "decoder"):
        yield from layer(f"{part}.conv_in", f"{part}/conv_in", conv)
        yield from _norm(f"{part}.{names.final_norm}", f"{part}/final_norm")
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
        for theirs, ours in ((down, f"encoder/down_{i}"), (up, f"decoder/up_{i}")):
            one = f"{theirs}.{names.level_attention}.{{j}}"
            yield from _attention(one, f"{ours}_{{j}}_attention", names.attention)
        yield from layer(f"{down}.{names.downsample}", f"encoder/down_{i}_resample", conv)
        yield from layer(f"{up}.{names.upsample}", f"decoder/up_{i}_resample", conv)


def _block(theirs: str, ours: str, skip: str) -> Iterator[Row]:
    for n in (1, 2):
        yield from _norm(f"{theirs}.norm{n}", f"{ours}/norm_{n}")
        yield from layer(f"{theirs}.conv{n}", f"{ours}/conv_{n}", conv)
    yield from layer(f"{theirs}.{skip}", f"{ours}/skip", _pointwise)


def _attention(theirs: str, ours: str, names: _Attention) -> Iterator[Row]:
    yield from norm(f"{theirs}.{names.norm}", f"{ours}/norm")
    yield from _spatial_norm(f"{theirs}.{names.spatial_norm}", f"{ours}/norm")
    for kind, name, how in (("weight", "kernel", names.kernel), ("bias", "bias", keep)):
        each = tuple(f"{theirs}.{part}.{kind}" for part in names.qkv)
        yield Row(each, f"{ours}/attention/qkv/{name}", merge(3, how))
    yield from layer(f"{theirs}.{names.out}", f"{ours}/attention/out", names.kernel)


def _norm(theirs: str, ours: str) -> Iterator[Row]:
    yield from norm(theirs, ours)
    yield from _spatial_norm(theirs, ours)


def _spatial_norm(theirs: str, ours: str) -> Iterator[Row]:
    yield from norm(f"{theirs}.norm_layer", f"{ours}/norm")
    yield from layer(f"{theirs}.conv_y", f"{ours}/scale", _pointwise)
    yield from layer(f"{theirs}.conv_b", f"{ours}/shift", _pointwise)


def recognised(names: Layout, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The settings of encoder and decoder that follow from the shapes of their tensors.

    Raises:
        KeyError: the tensors are in another layout.
    """
    # In all files of this layout alone, so that its absence names the layout.
    _ = shapes[f"encoder.{names.middle[1]}.{names.attention.qkv[0]}.weight"]
    first = f"{names.down}.{names.block}.{{j}}.conv1.weight"
    levels = count(first.replace("{j}", "0"), shapes)
    query = f"{names.down}.{names.level_attention}.0.{names.attention.qkv[0]}.weight"
    return {
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "channels": tuple(shapes[first.format(i=i, j=0)][0] for i in range(levels)),
        "num_res_blocks": count(first.replace("{i}", "0"), shapes),
        "image_channels": shapes["encoder.conv_in.weight"][1],
        "attention_levels": tuple(i for i in range(levels) if query.format(i=i) in shapes),
    }


def inputs(network: Any) -> tuple[jax.ShapeDtypeStruct]:
    """An image of one element of a latent."""
    shape = (1, network.scale, network.scale, network.image_channels)
    return (jax.ShapeDtypeStruct(shape, jnp.float32),)


def _family(name: str, names: Layout, config: Config | None = None) -> Family:
    def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        quant_convs = f"{names.quant_convs[0]}.weight" in shapes
        return {**recognised(names, shapes), "quant_convs": quant_convs}

    def table(network: AutoencoderKL) -> Table:
        return tuple(rows(names, network))

    return Family(name, AutoencoderKL, SIZES, table, recognise, inputs, _UNUSED, config=config)


def _flux2(name: str, names: Layout, config: Config | None = None) -> Family:
    other = _family(name, names, config)

    def recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        found = dict(other.recognise(shapes))
        packed = shapes["bn.running_mean"][0] / found["latent_channels"]
        return {**found, "patch_size": round(packed**0.5)}

    sizes = FLUX2_SIZES
    return replace(other, network=AutoencoderKLFlux2, sizes=sizes, recognise=recognise)


# Of its training: the discriminator, the network of the perceptual distance, averages, counts.
_UNUSED = ("loss.*", "model_ema.*", "bn.num_batches_tracked")


def settings_of_levels(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the convolutional encoder and decoder, from the entries of `config.json`."""
    return {
        "latent_channels": int(config["latent_channels"]),
        "channels": tuple(map(int, config["block_out_channels"])),
        "num_res_blocks": int(config["layers_per_block"]),
        "num_groups": int(config["norm_num_groups"]),
        "image_channels": int(config["in_channels"]),
    }


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **settings_of_levels(config),
        "quant_convs": bool(config.get("use_quant_conv", True)),
    }


def _config(network: AutoencoderKL) -> dict[str, Any]:
    return {
        **entries_of_levels(network),
        "use_post_quant_conv": network.quant_convs,
        "use_quant_conv": network.quant_convs,
    }


def entries_of_levels(network: Any) -> dict[str, Any]:
    """The entries of `config.json` that `settings_of_levels` reads, and the names of blocks."""
    each = ["Attn" if i in network.attention_levels else "" for i in range(len(network.channels))]
    return {
        "block_out_channels": list(network.channels),
        "in_channels": network.image_channels,
        "latent_channels": network.latent_channels,
        "layers_per_block": network.num_res_blocks,
        "norm_num_groups": network.num_groups,
        "out_channels": network.image_channels,
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in each],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(each)],
    }


def _flux2_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**_settings(config), "patch_size": int(config.get("patch_size", [2])[0])}


def _flux2_config(network: AutoencoderKLFlux2) -> dict[str, Any]:
    return {**_config(network), "patch_size": [network.patch_size] * 2}


FIXED = {"act_fn": "silu", "mid_block_add_attention": True}
_SCALING = {"scaling_factor": 0.18215, "shift_factor": None}
_OF_DIFFUSERS = Config("AutoencoderKL", FIXED, _settings, _config, beside=_SCALING)
_FLUX2_OF_DIFFUSERS = Config(
    "AutoencoderKLFlux2", {**FIXED, "batch_norm_eps": 1e-4}, _flux2_settings, _flux2_config
)

FAMILY = _family("AutoencoderKL", DIFFUSERS, _OF_DIFFUSERS)
OLD_DIFFUSERS = _family("AutoencoderKL of old diffusers", _OLD_DIFFUSERS, _OF_DIFFUSERS)
LDM = _family("AutoencoderKL of LDM", AUTHORS)
FLUX2 = _flux2("AutoencoderKLFlux2", DIFFUSERS, _FLUX2_OF_DIFFUSERS)
FLUX2_AUTHORS = _flux2("AutoencoderKLFlux2 of its authors", _FLUX2)
LAYOUTS: Mapping[str, Family] = {
    "encoder.quant_conv.weight": FLUX2_AUTHORS,
    "bn.running_mean": FLUX2,
    "encoder.mid.attn_1.q.weight": LDM,
    "encoder.mid_block.attentions.0.query.weight": OLD_DIFFUSERS,
    "encoder.mid_block.attentions.0.to_q.weight": FAMILY,
}
"""The families of all layouts, by a tensor that is in their files and in none of the next ones'."""


def family_of(state: Mapping[str, Any], layouts: Mapping[str, Family] = LAYOUTS) -> Family:
    """The family with the layout of published tensors, by their names; the last where none fits.

    Example:
        >>> family_of({"encoder.mid.attn_1.q.weight": None}).name
        'AutoencoderKL of LDM'
    """
    found = (family for name, family in layouts.items() if name in state)
    return next(found, [*layouts.values()][-1])


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


def read(
    path: str | Path, network: Any = None, layouts: Mapping[str, Family] = LAYOUTS
) -> tuple[Any, Any]:
    """Reads a published file of any of the layouts; see `Family.read`.

    Args:
        path: the path of the file, of torch or safetensors.
        network: the network; by default it is recognised by the shapes, with 32 groups.
        layouts: by a tensor of each.

    Returns:
        The network and its parameters.

    Raises:
        UserError: the file can't be read, or is of another network.
    """
    state = without_prefix(read_state_dict(path))
    family = family_of(state, layouts)
    if network is None:
        network = family.network_of(state, str(path))
    return network, family.to_ours(state, network, str(path))
