"""The layout of DC-AE's files: that of diffusers (`AutoencoderDC`).

It numbers the blocks of a level and the convolution to the next level as one sequence.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.models.dc_ae.network import DCAE
from diffjax.models.dc_ae.sizes import SIZES
from diffjax.pretrained.family import Config, Family
from diffjax.pretrained.tables import Row, Table, count, layer, norm
from diffjax.pretrained.transforms import conv, dense, merge, squeeze, then

_pointwise = then(squeeze(2, 3), dense)


def _rows(network: DCAE) -> Iterator[Row]:
    inner = "" if network.encoder_blocks[0] else ".conv"
    ours = "" if network.encoder_blocks[0] else "/conv"
    yield from layer(f"encoder.conv_in{inner}", f"encoder/conv_in{ours}", conv)
    yield from layer("encoder.conv_out", "encoder/final_conv", conv)
    yield from layer("decoder.conv_in", "decoder/conv_in", conv)
    yield from norm("decoder.norm_out", "decoder/final_norm")
    yield from layer(f"decoder.conv_out{inner}", f"decoder/final_conv{ours}", conv)
    last = len(network.channels) - 1
    for level in range(last + 1):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        ours_down, ours_up = f"encoder/down_{level}", f"decoder/up_{level}"
        blocks = network.encoder_blocks[level]
        before = int(level < last)
        yield from layer(f"{down}.{blocks}.conv", f"{ours_down}_resample/conv", conv)
        yield from layer(f"{up}.0.conv", f"{ours_up}_resample/conv", conv)
        for i in range(blocks):
            yield from _block(f"{down}.{i}", f"{ours_down}_{i}")
        for i in range(network.decoder_blocks[level]):
            yield from _block(f"{up}.{i + before}", f"{ours_up}_{i}")


def _block(theirs: str, ours: str) -> Iterator[Row]:
    """The rows of a block, of either kind."""
    yield from layer(f"{theirs}.conv1", f"{ours}/conv_1", conv)
    yield Row(f"{theirs}.conv2.weight", f"{ours}/conv_2/kernel", conv)
    yield from norm(f"{theirs}.norm", f"{ours}/norm")
    yield Row(f"{theirs}.norm.running_mean", f"{ours}/norm/mean")
    yield Row(f"{theirs}.norm.running_var", f"{ours}/norm/variance")
    attention, here = f"{theirs}.attn", f"{ours}_attention"
    qkv = tuple(f"{attention}.to_{name}.weight" for name in "qkv")
    yield Row(qkv, f"{here}/qkv/kernel", merge(3, dense))
    scale = f"{attention}.to_qkv_multiscale.{{k}}"
    yield Row(f"{scale}.proj_in.weight", f"{here}/local_{{k}}/kernel", conv)
    yield Row(f"{scale}.proj_out.weight", f"{here}/mixed_{{k}}/kernel", conv)
    yield Row(f"{attention}.to_out.weight", f"{here}/out/kernel", dense)
    yield from norm(f"{attention}.norm_out", f"{here}/norm")
    gated, here = f"{theirs}.conv_out", f"{ours}_conv"
    yield from layer(f"{gated}.conv_inverted", f"{here}/up", _pointwise)
    yield from layer(f"{gated}.conv_depth", f"{here}/depthwise", conv)
    yield Row(f"{gated}.conv_point.weight", f"{here}/down/kernel", _pointwise)
    yield from norm(f"{gated}.norm", f"{here}/norm")


def _table(network: DCAE) -> Table:
    return tuple(_rows(network))


_FIRST = "conv1", "attn.to_q"
"""The first layer of a residual block, and of one with attention."""


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    latent_channels = shapes["encoder.conv_out.weight"][0]
    levels = range(1 + max(int(name.split(".")[2]) for name in shapes if "_blocks." in name))

    def num_blocks(part: str, level: int) -> int:
        return sum(count(f"{part}.{level}.{{i}}.{name}.weight", shapes) for name in _FIRST)

    def first_of(level: int, name: str) -> tuple[int, ...] | None:
        return shapes.get(f"encoder.down_blocks.{level}.0.{name}.weight")

    outputs = [first_of(level, _FIRST[0]) or first_of(level, _FIRST[1]) for level in levels]
    channels = [each[0] if each else 0 for each in outputs]
    skipped = not channels[0]
    if skipped:
        channels[0] = channels[1] // 2
    encoder_blocks, decoder_blocks = (
        tuple(num_blocks(part, level) for level in levels)
        for part in ("encoder.down_blocks", "decoder.up_blocks")
    )
    attention = tuple(level for level in levels if first_of(level, _FIRST[1]))
    further = f"encoder.down_blocks.{min(attention, default=0)}.0.attn.to_qkv_multiscale"
    local = f"{further}.{{k}}.proj_in.weight"
    mixed = shapes.get(f"{further}.0.proj_out.weight")
    step = shapes[f"encoder.down_blocks.{int(skipped)}.{encoder_blocks[skipped]}.conv.weight"][0]
    return {
        "latent_channels": latent_channels,
        "channels": tuple(channels),
        "encoder_blocks": encoder_blocks,
        "decoder_blocks": decoder_blocks,
        "attention_levels": attention,
        "kernel_sizes": tuple(shapes[local.format(k=k)][-1] for k in range(count(local, shapes))),
        "batch_norm": any(name.endswith("running_mean") for name in shapes),
        "shuffle": 4 * step == channels[skipped + 1],
        "image_channels": shapes[f"encoder.conv_in{'.conv' if skipped else ''}.weight"][1],
        # Without further heads it has no trace.
        **({"head_width": mixed[1]} if mixed else {}),
    }


def _inputs(network: DCAE) -> tuple[jax.ShapeDtypeStruct]:
    shape = (1, network.scale, network.scale, network.image_channels)
    return (jax.ShapeDtypeStruct(shape, jnp.float32),)


_KINDS = {False: "ResBlock", True: "EfficientViTBlock"}
_NORMS = {False: ("rms_norm", "silu"), True: ("batch_norm", "relu")}
_CONVS = {False: ("Conv", "interpolate"), True: ("pixel_unshuffle", "pixel_shuffle")}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    channels = _of_both(config, "{}_block_out_channels")
    levels = range(len(channels))

    def of_levels(name: str) -> list[Any]:
        value = config[name]
        return [value for _ in levels] if isinstance(value, str) else list(value)

    encoder_blocks, decoder_blocks = (
        tuple(map(int, config[f"{part}_layers_per_block"])) for part in ("encoder", "decoder")
    )
    kinds = of_levels("encoder_block_types")
    if kinds != of_levels("decoder_block_types"):
        raise ValueError("the encoder's blocks are of other types than the decoder's")
    attention = tuple(level for level in levels if kinds[level] == _KINDS[True])
    scales = {tuple(each) for each in _of_both(config, "{}_qkv_multiscales", attention)}
    if len(scales) > 1:
        raise ValueError(f"levels have the kernel sizes {sorted(scales)}, and here they share them")
    norms = [of_levels("decoder_norm_types"), of_levels("decoder_act_fns")]
    residual = {
        (one, other)
        for level, one, other in zip(levels, *norms, strict=True)
        if level not in attention and decoder_blocks[level]
    }
    batch_norm = residual == {_NORMS[True]}
    if not batch_norm and residual - {_NORMS[False]}:
        raise ValueError(f"residual blocks of the decoder have {sorted(residual)}")
    if any(norms[0][level] != "rms_norm" for level in attention):
        raise ValueError("attention has other norms than rms_norm")
    shuffle = config["downsample_block_type"] == _CONVS[True][0]
    if shuffle != (config["upsample_block_type"] == _CONVS[True][1]):
        raise ValueError("maps are halved and doubled in unlike ways")
    return {
        "latent_channels": int(config["latent_channels"]),
        # Nothing depends on the channels of a level without blocks.
        "channels": (channels[0] if encoder_blocks[0] else channels[1] // 2, *channels[1:]),
        "encoder_blocks": encoder_blocks,
        "decoder_blocks": decoder_blocks,
        "attention_levels": attention,
        "kernel_sizes": next(iter(scales), ()),
        "head_width": int(config["attention_head_dim"]),
        "batch_norm": batch_norm,
        "shuffle": shuffle,
        "image_channels": int(config["in_channels"]),
    }


def _of_both(
    config: Mapping[str, Any], name: str, levels: Sequence[int] | None = None
) -> tuple[Any, ...]:
    """An entry that the encoder and the decoder have in common, of some levels."""
    one, other = (
        tuple(tuple(x) if isinstance(x, list) else x for x in config[name.format(part)])
        for part in ("encoder", "decoder")
    )
    if one != other:
        raise ValueError(f"{name.format('encoder')} is not {name.format('decoder')}")
    return one if levels is None else tuple(one[level] for level in levels)


def _config(network: DCAE) -> dict[str, Any]:
    levels = range(len(network.channels))
    attention = [level in network.attention_levels for level in levels]
    kinds = [_KINDS[each] for each in attention]
    scales = [list(network.kernel_sizes) if each else [] for each in attention]
    norms = [_NORMS[network.batch_norm and not each] for each in attention]
    down, up = _CONVS[network.shuffle]
    return {
        "attention_head_dim": network.head_width,
        "decoder_act_fns": [act for _, act in norms],
        "decoder_block_out_channels": list(network.channels),
        "decoder_block_types": kinds,
        "decoder_layers_per_block": list(network.decoder_blocks),
        "decoder_norm_types": [name for name, _ in norms],
        "decoder_qkv_multiscales": scales,
        "downsample_block_type": down,
        "encoder_block_out_channels": list(network.channels),
        "encoder_block_types": kinds,
        "encoder_layers_per_block": list(network.encoder_blocks),
        "encoder_qkv_multiscales": scales,
        "in_channels": network.image_channels,
        "latent_channels": network.latent_channels,
        "upsample_block_type": up,
    }


_FIXED = {"decoder_conv_act_fn": "relu", "decoder_in_shortcut": True, "encoder_out_shortcut": True}
FAMILY = Family(
    "DC-AE",
    DCAE,
    SIZES,
    _table,
    _recognise,
    _inputs,
    unused=("*.num_batches_tracked",),
    config=Config("AutoencoderDC", _FIXED, _settings, _config, beside={"scaling_factor": 1.0}),
)
LAYOUTS: Mapping[str, Family] = {"encoder.conv_out.weight": FAMILY}
"""The families of all layouts, by a tensor that is in the files of each alone."""
