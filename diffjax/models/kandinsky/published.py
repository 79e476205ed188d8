"""The layout of Kandinsky 2's decoders in diffusers: `UNet2DConditionModel`, by other settings.

Blocks are those of Stable Diffusion's layout, but that maps are halved and doubled in residual
blocks, and that attention has layers for the tokens' keys and values, `add_k_proj`, `add_v_proj`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from diffjax.conditions import Condition, ImageEmbeddings, Images, KeptLatents
from diffjax.errors import UserError
from diffjax.models.kandinsky.network import KandinskyUNet
from diffjax.models.kandinsky.sizes import SIZES
from diffjax.models.stable_diffusion.published import (
    RESIDUAL,
    REST,
    groups_of,
    one_number_of_groups,
    parts_of_condition,
    widths_of,
    with_parts,
)
from diffjax.models.unet import multipliers_of
from diffjax.pretrained.family import Config, Denoiser, Family, Published
from diffjax.pretrained.tables import Row, Table, count, layer, norm, within
from diffjax.pretrained.transforms import dense, merge

TEXT_LENGTH = 77
"""The number of a text's tokens in 2.1."""


def _of(kind: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{kind}" for name in names)


_ATTENTION: Table = (
    *norm("group_norm", "norm"),
    Row(_of("weight", "to_q", "to_k", "to_v"), "attention/qkv/kernel", merge(3, dense)),
    Row(_of("bias", "to_q", "to_k", "to_v"), "attention/qkv/bias", merge(3)),
    Row(_of("weight", "add_k_proj", "add_v_proj"), "attention/context_kv/kernel", merge(2, dense)),
    Row(_of("bias", "add_k_proj", "add_v_proj"), "attention/context_kv/bias", merge(2)),
    *layer("to_out.0", "attention/out"),
)
_EMBEDDINGS: Table = (
    *layer("add_embedding.image_proj", "added_image"),
    *norm("add_embedding.image_norm", "added_image_norm"),
    *layer("add_embedding.text_proj", "added_text"),
    *norm("add_embedding.text_norm", "added_text_norm"),
    *layer("encoder_hid_proj.image_embeds", "image_tokens"),
    *norm("encoder_hid_proj.norm", "image_tokens_norm"),
    *layer("encoder_hid_proj.text_proj", "text_tokens"),
)


def _places(levels: int, blocks: int) -> Iterator[tuple[Table, str, str]]:
    """The rows of each block, its published name and ours. Levels count from both ends there."""
    for level in range(levels):
        there, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        for i in range(blocks):
            yield RESIDUAL, f"{there}.resnets.{i}", f"down_{level}_{i}"
            yield _ATTENTION, f"{there}.attentions.{i}", f"down_{level}_{i}_attention"
        yield RESIDUAL, f"{there}.downsamplers.0", f"down_{level}_resample"
        for i in range(blocks + 1):
            yield RESIDUAL, f"{up}.resnets.{i}", f"up_{level}_{i}"
            yield _ATTENTION, f"{up}.attentions.{i}", f"up_{level}_{i}_attention"
        yield RESIDUAL, f"{up}.upsamplers.0", f"up_{level}_resample"
    yield RESIDUAL, "mid_block.resnets.0", "middle_0"
    yield _ATTENTION, "mid_block.attentions.0", "middle_attention"
    yield RESIDUAL, "mid_block.resnets.1", "middle_1"


def _table(denoiser: Denoiser) -> Table:
    levels = len(denoiser.network.channel_multipliers)
    rows = [*REST, *_EMBEDDINGS]
    for block, theirs, ours in _places(levels, denoiser.network.num_res_blocks):
        rows += within(block, theirs, ours)
    return rows


def kandinsky(
    image_shape: tuple[int, int, int] = (64, 64, 4),
    given_channels: int = 0,
    pooled_width: int = 0,
    **settings: Any,
) -> Denoiser:
    """A decoder of Kandinsky 2 with the kind of its condition.

    Args:
        image_shape: the shape of its latents.
        given_channels: the number of channels of images beside the latents; 5 for inpainting, the
            latents of the image that is kept and a mask.
        pooled_width: the width of the pooled vector of a text, in 2.1.
        **settings: settings of the network.
    """
    network = KandinskyUNet(0, **settings)
    length = 1 + TEXT_LENGTH if network.text_width else 1
    width = max(network.image_width, network.text_width)
    text = ImageEmbeddings(length, width, pooled_width, embedding_width=network.image_width)
    parts: dict[str, Condition] = {"text": text}
    if given_channels:
        kind = KeptLatents if given_channels == image_shape[2] + 1 else Images
        parts["image"] = kind((*image_shape[:2], given_channels))
    return Denoiser(network, image_shape, with_parts(parts, tuple(parts)[1:]))


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    channels, image_channels, _, _ = shapes["conv_in.weight"]
    out_channels = shapes["conv_out.bias"][0]
    levels = count("down_blocks.{i}.resnets.0.conv1.bias", shapes)
    widths = [shapes[f"down_blocks.{i}.resnets.0.conv1.bias"][0] for i in range(levels)]
    context_width = shapes["mid_block.attentions.0.add_k_proj.weight"][1]
    rows, image_width = shapes["encoder_hid_proj.image_embeds.weight"]
    # Half of the outputs are those of a learned variance.
    return {
        "given_channels": image_channels - out_channels // 2,
        "pooled_width": shapes.get("add_embedding.text_proj.weight", (0, 0))[1],
        "channels": channels,
        "channel_multipliers": multipliers_of(channels, widths),
        "num_res_blocks": count("down_blocks.0.resnets.{i}.conv1.bias", shapes),
        "out_channels": out_channels,
        "token_levels": tuple(
            i for i in range(levels) if f"down_blocks.{i}.attentions.0.to_q.weight" in shapes
        ),
        "image_width": image_width,
        "text_width": shapes.get("encoder_hid_proj.text_proj.weight", (0, 0))[1],
        "num_image_tokens": rows // context_width,
        "context_width": context_width,
    }


_FIXED: Mapping[str, Any] = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "norm_eps": 1e-5,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "scale_shift",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
_DOWN = {False: "ResnetDownsampleBlock2D", True: "SimpleCrossAttnDownBlock2D"}
_UP = {False: "ResnetUpsampleBlock2D", True: "SimpleCrossAttnUpBlock2D"}
_KINDS = {("image", "image_proj"): False, ("text_image", "text_image_proj"): True}
"""What is embedded, and whether it has a text."""
_IMAGE_TOKENS = {False: 32, True: 10}
"""The number of tokens that diffusers makes of an embedding, without and with a text."""


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    kind = config["addition_embed_type"], config["encoder_hid_dim_type"]
    if kind not in _KINDS:
        raise ValueError(f"it embeds {kind[0]!r} and {kind[1]!r}, which is not known here")
    widths = [int(width) for width in config["block_out_channels"]]
    attends = [
        {name: here for here, name in _DOWN.items()}[block] for block in config["down_block_types"]
    ]
    if list(config["up_block_types"]) != [_UP[here] for here in attends[::-1]]:
        raise ValueError("its up_block_types do not mirror down_block_types")
    side, out_channels = config.get("sample_size") or 64, int(config["out_channels"])
    height, width = (side, side) if isinstance(side, int) else side
    if out_channels % 2:
        raise ValueError(f"out_channels={out_channels} are not a noise and its variance")
    return {
        "image_shape": (int(height), int(width), out_channels // 2),
        "head_channels": int(config["attention_head_dim"]),
        "token_levels": tuple(level for level, here in enumerate(attends) if here),
        "channel_multipliers": multipliers_of(widths[0], widths),
        "num_groups": groups_of(int(config.get("norm_num_groups") or 32), widths),
        "dropout": float(config.get("dropout", 0.0)),
    }


def _config(denoiser: Denoiser) -> dict[str, Any]:
    network, (height, width, channels) = denoiser.network, denoiser.image_shape
    parts = parts_of_condition(denoiser.condition)
    given = parts["image"].shape[-1] if "image" in parts else 0
    widths = widths_of(network)
    attends = [level in network.token_levels for level in range(len(widths))]
    has_text = network.text_width > 0
    same = {network.image_width, parts["text"].pooled_width, network.context_width}
    wanted = _IMAGE_TOKENS[has_text]
    if network.num_image_tokens != wanted or (has_text and len(same) > 1):
        raise UserError(
            f"UNet2DConditionModel makes {wanted} tokens of an embedding, and with a text "
            "image_width, pooled_width and context_width are equal; this network differs"
        )
    added, projected = next(names for names, text in _KINDS.items() if text is has_text)
    return {
        "sample_size": height if height == width else [height, width],
        "in_channels": channels + given,
        "out_channels": network.out_channels,
        "block_out_channels": widths,
        "layers_per_block": network.num_res_blocks,
        "down_block_types": [_DOWN[here] for here in attends],
        "up_block_types": [_UP[here] for here in attends[::-1]],
        "cross_attention_dim": network.context_width,
        "attention_head_dim": network.head_channels,
        "norm_num_groups": one_number_of_groups(network),
        "dropout": network.dropout,
        "addition_embed_type": added,
        "encoder_hid_dim_type": projected,
        "encoder_hid_dim": network.text_width or network.image_width,
    }


def _published(denoiser: Denoiser) -> Published:
    """2.1 is sampled by DDIM in its pipeline, 2.2 by DDPM with the learned variance."""
    return Published(
        objective="objective=ddpm_table,path=kandinsky_table,wrappers=learned_variance,"
        "noise_label=step",
        solver="ddim" if denoiser.network.text_width else "ddpm_learned",
        grid="leading",
        num_steps=100,
        guidance_scale=4.0,
        codec="movq",
    )


FAMILY = Family(
    "Kandinsky 2",
    kandinsky,
    SIZES,
    _table,
    _recognise,
    lambda denoiser: denoiser.inputs,
    config=Config("UNet2DConditionModel", _FIXED, _settings, _config),
    published=_published,
)
