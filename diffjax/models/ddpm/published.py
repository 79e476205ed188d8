"""The layout of `UNet2DModel` of diffusers, in which DDPM's networks are published.

Queries, keys and values are one layer each. Files of 2022, those of Google's networks among them,
have other names for attention (`OLD`).

The networks predict the noise on DDPM's table of 1,000 steps; noise labels are whole timesteps 0 to
999.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from diffjax.errors import UserError
from diffjax.models.ddpm.network import DDPMUNet
from diffjax.models.ddpm.sizes import SIZES
from diffjax.models.unet import multipliers_of, num_groups
from diffjax.pretrained.family import Config, Denoiser, Family, Published
from diffjax.pretrained.tables import Row, Table, count, layer, norm, within
from diffjax.pretrained.transforms import conv, dense, merge, squeeze, then

_pixelwise = then(squeeze(2, 3), dense)
"""A dense layer of each pixel, `[out, in, 1, 1]` there."""


_RESIDUAL = (
    *norm("norm1", "norm_1"),
    *layer("conv1", "conv_1", conv),
    *layer("time_emb_proj", "modulation"),
    *norm("norm2", "norm_2"),
    *layer("conv2", "conv_2", conv),
    *layer("conv_shortcut", "skip", _pixelwise),
)
_CONVOLUTION = (
    Row("weight", "kernel", conv),
    Row("bias", "bias"),
)
_REST = (
    *layer("time_embedding.linear_1", "conditioning/hidden"),
    *layer("time_embedding.linear_2", "conditioning/out"),
    Row("class_embedding.weight", "conditioning/label/embedding"),
    *layer("conv_in", "conv_in", conv),
    *norm("conv_norm_out", "final_norm"),
    *layer("conv_out", "final_conv", conv),
)


def _attention(queries: str, keys: str, values: str, out: str) -> Table:
    """The rows of an attention block, from the names of its layers."""
    parts = queries, keys, values
    return (
        *norm("group_norm", "norm"),
        Row(
            tuple(f"{part}.weight" for part in parts),
            "attention/qkv/kernel",
            merge(3, dense),
        ),
        Row(tuple(f"{part}.bias" for part in parts), "attention/qkv/bias", merge(3)),
        *layer(out, "attention/out"),
    )


_ATTENTION = _attention("to_q", "to_k", "to_v", "to_out.0")
_OLD_ATTENTION = _attention("query", "key", "value", "proj_attn")


def _places(levels: int, blocks: int) -> Iterator[tuple[str, str, str]]:
    """The kind of each block, its published name and ours. Levels count from both ends there."""
    for level in range(levels):
        for i in range(blocks):
            here = f"down_{level}_{i}"
            yield "residual", f"down_blocks.{level}.resnets.{i}", here
            yield "attention", f"down_blocks.{level}.attentions.{i}", f"{here}_attention"
        yield "conv", f"down_blocks.{level}.downsamplers.0.conv", f"down_{level}_resample"
    yield "residual", "mid_block.resnets.0", "middle_0"
    yield "attention", "mid_block.attentions.0", "middle_attention"
    yield "residual", "mid_block.resnets.1", "middle_1"
    for level in range(levels):
        there = f"up_blocks.{levels - 1 - level}"
        for i in range(blocks + 1):
            here = f"up_{level}_{i}"
            yield "residual", f"{there}.resnets.{i}", here
            yield "attention", f"{there}.attentions.{i}", f"{here}_attention"
        yield "conv", f"{there}.upsamplers.0.conv", f"up_{level}_resample"


def _table(denoiser: Denoiser, attention: Table = _ATTENTION) -> Table:
    network, rows = denoiser.network, list(_REST)
    kinds = {"residual": _RESIDUAL, "attention": attention, "conv": _CONVOLUTION}
    for kind, theirs, ours in _places(len(network.channel_multipliers), network.num_res_blocks):
        rows += within(kinds[kind], theirs, ours)
    return rows


def _old_table(denoiser: Denoiser) -> Table:
    return _table(denoiser, _OLD_ATTENTION)


def ddpm(
    side: int = 32,
    image_channels: int = 3,
    num_classes: int = 0,
    attention_levels: Iterable[int] = (1,),
    **settings: Any,
) -> Denoiser:
    """A DDPM with square images; maps of these levels are followed by attention."""
    resolutions = tuple(side >> level for level in attention_levels)
    network = DDPMUNet(num_classes, attention_resolutions=resolutions, **settings)
    return Denoiser(network, (side, side, image_channels))


def _recognise(shapes: Mapping[str, tuple[int, ...]], queries: str = "to_q") -> dict[str, Any]:
    """The settings of a network whose layer of queries has this name."""
    _ = shapes["mid_block.resnets.0.time_emb_proj.bias"]
    _ = shapes[f"mid_block.attentions.0.{queries}.bias"]
    channels, image_channels, _, _ = shapes["conv_in.weight"]
    levels = count("down_blocks.{i}.resnets.0.conv1.bias", shapes)
    widths = [shapes[f"down_blocks.{i}.resnets.0.conv1.bias"][0] for i in range(levels)]
    out_channels = shapes["conv_out.bias"][0]
    return {
        "image_channels": image_channels,
        "num_classes": shapes.get("class_embedding.weight", (0,))[0],
        "channels": channels,
        "channel_multipliers": multipliers_of(channels, widths),
        "num_res_blocks": count("down_blocks.0.resnets.{i}.conv1.bias", shapes),
        "attention_levels": tuple(
            i for i in range(levels) if f"down_blocks.{i}.attentions.0.group_norm.bias" in shapes
        ),
        **({} if out_channels == image_channels else {"out_channels": out_channels}),
    }


def _recognise_old(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return _recognise(shapes, "query")


_FIXED = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "mid_block_scale_factor": 1,
    "norm_num_groups": 32,
    "time_embedding_type": "positional",
}
_LARGEST_SIDE = 4096


def _check_groups(widths: Iterable[int]) -> None:
    """Refuses widths that are normalised in 32 groups there and in fewer here.

    Raises:
        UserError: such a width.
    """
    for width in widths:
        if num_groups(width) != _FIXED["norm_num_groups"]:
            raise UserError(
                f"UNet2DModel normalises in 32 groups, and {width} channels have "
                f"{num_groups(width)} here: take a multiple of 32, at least 128"
            )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    side, widths = int(config["sample_size"]), [int(w) for w in config["block_out_channels"]]
    if not 0 < side <= _LARGEST_SIDE or not widths or min(widths) < 1:
        raise ValueError(f"sample_size={side} and block_out_channels={widths}")
    _check_groups(widths)
    channels, out_channels = int(config["in_channels"]), int(config["out_channels"])
    kinds = {"DownBlock2D": False, "AttnDownBlock2D": True}
    attends = [kinds[kind] for kind in config["down_block_types"]]
    return {
        "side": side,
        "image_channels": channels,
        "num_classes": int(config.get("num_class_embeds") or 0),
        "out_channels": 0 if out_channels == channels else out_channels,
        "channels": widths[0],
        "channel_multipliers": multipliers_of(widths[0], widths),
        "num_res_blocks": int(config["layers_per_block"]),
        "attention_levels": tuple(level for level, here in enumerate(attends) if here),
        "norm_epsilon": float(config["norm_eps"]),
        "dropout": float(config.get("dropout", 0.0)),
    }


def _config(denoiser: Denoiser) -> dict[str, Any]:
    network, (height, width, channels) = denoiser.network, denoiser.image_shape
    if height != width:
        raise UserError(f"UNet2DModel has square images, not {height}x{width}")
    levels = range(len(network.channel_multipliers))
    attends = [height >> level in network.attention_resolutions for level in levels]
    widths = [int(m * network.channels) for m in network.channel_multipliers]
    _check_groups(widths)
    return {
        "sample_size": height,
        "in_channels": channels,
        "out_channels": network.out_channels or channels,
        "num_class_embeds": network.num_classes or None,
        "block_out_channels": widths,
        "layers_per_block": network.num_res_blocks,
        "down_block_types": ["AttnDownBlock2D" if here else "DownBlock2D" for here in attends],
        "up_block_types": ["AttnUpBlock2D" if here else "UpBlock2D" for here in attends[::-1]],
        "norm_eps": network.norm_epsilon,
        "dropout": network.dropout,
    }


def _published(denoiser: Denoiser) -> Published:
    """All 1,000 steps, with the larger variance."""
    del denoiser
    return Published(
        objective="objective=ddpm_table,noise_label=step",
        solver="ddpm_large",
        grid="linspace",
        num_steps=1000,
        guidance_scale=1.0,
        condition_dropout=0.0,
    )


FAMILY = Family(
    "DDPM",
    ddpm,
    SIZES,
    _table,
    _recognise,
    lambda denoiser: denoiser.inputs,
    config=Config("UNet2DModel", _FIXED, _settings, _config),
    published=_published,
)
OLD = replace(FAMILY, name="DDPM of old diffusers", table=_old_table, recognise=_recognise_old)
