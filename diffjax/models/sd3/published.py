"""The layouts of Stable Diffusion 3 and 3.5: Stability AI's files, and folders of diffusers.

- Names in Stability's files follow `model.diffusion_model.`, beside other parts. Queries, keys and
  values are thirds of one matrix, as here. Modulations are shift, scale and gate, as here, and of a
  second attention after the others.
- diffusers (`SD3Transformer2DModel`) splits queries, keys and values, and stores scale before shift
  where a modulation has no gate: after the blocks, and of the text in the last block.

Both hold the positions, for the largest images; an image takes those of the middle. The network
predicts the velocity `noise - data` at 1000 times the time, from states of CLIP and T5 one after
the other, and attends to padding. It was trained with logit-normal times. The authors sample with
28 steps of Euler (SD3) or 40 (3.5) on the grid shifted by 3. The weights of Turbo are those of a
3.5 Large that was distilled to four steps without guidance; their shapes are the same.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffjax.conditions import Tokens
from diffjax.models.dit.tables import blocks, patches_by_conv
from diffjax.models.sd3.network import MMDiT
from diffjax.models.sd3.sizes import SIZES
from diffjax.models.sd3.tables import (
    MLPS_OF_DIFFUSERS,
    depth_of,
    described,
    joint_of_diffusers,
    mapped,
    of_diffusers,
    two_layers,
)
from diffjax.pretrained.family import Config, Denoiser, Family, Published
from diffjax.pretrained.tables import Row, Table, count, layer, within
from diffjax.pretrained.transforms import keep, squeeze

_LENGTH = 77 + 256
"""Tokens of CLIP, and then of T5."""


def sd3(
    side: int = 128,
    channels: int = 16,
    context_width: int = 4096,
    pooled_width: int = 2048,
    **settings: Any,
) -> Denoiser:
    """An MMDiT with square latents of this side, 128 for images of 1024 pixels."""
    condition = Tokens(_LENGTH, context_width, pooled_width)
    return Denoiser(MMDiT(**settings), (side, side, channels), condition)


def _joint() -> tuple[Row, ...]:
    """The rows of a block by the authors' names."""
    rows: list[Row] = []
    for theirs, ours in (("x_block", ""), ("context_block", "context_")):
        attention = (
            *layer("qkv", f"{ours}qkv"),
            *layer("proj", f"{ours}out"),
            Row("ln_q.weight", f"{ours}q_norm/scale"),
            Row("ln_k.weight", f"{ours}k_norm/scale"),
        )
        stream = (
            *layer("adaLN_modulation.1", f"{ours}modulation"),
            *within(attention, "attn", "attention"),
            *two_layers(("mlp.fc1", "mlp.fc2"), (f"{ours}mlp/up", f"{ours}mlp/down")),
        )
        rows += within(stream, theirs)
        if not ours:
            rows += within(attention, f"{theirs}.attn2", "image_attention")
    return tuple(rows)


def _table(denoiser: Denoiser) -> Table:
    network = denoiser.network
    patches = patches_by_conv(network.hidden_size, network.patch_size)
    embedder = "mlp.0", "mlp.2"
    return (
        Row("pos_embed", "positions", squeeze(0)),
        Row("x_embedder.proj.weight", "patch_embedding/kernel", patches),
        Row("x_embedder.proj.bias", "patch_embedding/bias"),
        *within(two_layers(embedder, ("hidden", "out")), "t_embedder", "conditioning"),
        *within(two_layers(embedder, ("pooled_hidden", "pooled_out")), "y_embedder"),
        *layer("context_embedder", "context_embedding"),
        *blocks(network, _joint(), "joint_blocks.{}".format, network.joint_stages),
        *layer("final_layer.adaLN_modulation.1", "final_modulation"),
        *layer("final_layer.linear", "final_out"),
    )


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    hidden_size, channels, patch, _ = shapes["x_embedder.proj.weight"]
    return {
        "patch_size": patch,
        "hidden_size": hidden_size,
        "channels": channels,
        "depth": depth_of("joint_blocks.{i}.x_block.attn.qkv.weight", shapes),
        "dual_blocks": count("joint_blocks.{i}.x_block.attn2.qkv.weight", shapes),
        "qk_norm": "joint_blocks.0.x_block.attn.ln_q.weight" in shapes,
        "stored_positions": math.isqrt(shapes["pos_embed"][1]),
        "context_width": shapes["context_embedder.weight"][1],
        "pooled_width": shapes["y_embedder.mlp.0.weight"][1],
    }


def _published(denoiser: Denoiser) -> Published:
    newer = denoiser.network.qk_norm
    return Published(
        objective="objective=sd3",
        solver="euler",
        grid="shifted",
        num_steps=40 if newer else 28,
        guidance_scale=4.5 if newer else 7.0,
        codec="sd3-vae",
    )


FAMILY = Family(
    "SD3",
    sd3,
    SIZES,
    _table,
    _recognise,
    lambda denoiser: denoiser.inputs,
    published=_published,
)


def _table_of_diffusers(denoiser: Denoiser) -> Table:
    network = denoiser.network
    names = "transformer_blocks.{}".format
    last = network.joint_stages[-1]
    patches = patches_by_conv(network.hidden_size, network.patch_size)
    return (
        Row("pos_embed.pos_embed", "positions", squeeze(0)),
        Row("pos_embed.proj.weight", "patch_embedding/kernel", patches),
        Row("pos_embed.proj.bias", "patch_embedding/bias"),
        *of_diffusers(),
        *blocks(network, MLPS_OF_DIFFUSERS, names, network.joint_stages),
        *blocks(network, joint_of_diffusers(network), names, network.joint_stages[:-1]),
        *blocks(network, joint_of_diffusers(network, context_ends=True), names, [last]),
        *mapped("proj_out", "final_out", keep),
    )


def _recognise_diffusers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    hidden_size, channels, patch, _ = shapes["pos_embed.proj.weight"]
    return {
        "patch_size": patch,
        "hidden_size": hidden_size,
        "channels": channels,
        "depth": depth_of("transformer_blocks.{i}.attn.add_q_proj.weight", shapes),
        "dual_blocks": count("transformer_blocks.{i}.attn2.to_q.weight", shapes),
        "qk_norm": "transformer_blocks.0.attn.norm_q.weight" in shapes,
        "stored_positions": math.isqrt(shapes["pos_embed.pos_embed"][1]),
        "context_width": shapes["context_embedder.weight"][1],
        "pooled_width": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
    }


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    heads, width = int(config["num_attention_heads"]), int(config["attention_head_dim"])
    dual = tuple(config.get("dual_attention_layers") or ())
    if dual != tuple(range(len(dual))):
        raise ValueError(f"dual_attention_layers={list(dual)} are not the first blocks")
    if config["out_channels"] not in (None, config["in_channels"]):
        raise ValueError(f"out_channels={config['out_channels']} are not those of the input")
    if config.get("qk_norm") not in (None, "rms_norm"):
        raise ValueError(f"qk_norm={config['qk_norm']!r} is neither null nor 'rms_norm'")
    if config["caption_projection_dim"] != heads * width:
        raise ValueError(
            f"caption_projection_dim={config['caption_projection_dim']} is not the width of the "
            f"tokens, {heads * width}"
        )
    return {
        "side": int(config["sample_size"]),
        "channels": int(config["in_channels"]),
        "patch_size": int(config["patch_size"]),
        "hidden_size": heads * width,
        "depth": int(config["num_layers"]),
        "num_heads": heads,
        "dual_blocks": len(dual),
        "qk_norm": config.get("qk_norm") is not None,
        "stored_positions": int(config["pos_embed_max_size"]),
        "context_width": int(config["joint_attention_dim"]),
        "pooled_width": int(config["pooled_projection_dim"]),
    }


_WITHOUT = {
    "rotary_axes": (), "single_depth": 0, "embedded_guidance": 0.0, "shared_modulation": False,
    "bias": True, "mlp": "gelu", "mlp_ratio": 4.0,
}  # fmt: skip


def _config(denoiser: Denoiser) -> dict[str, Any]:
    network, (side, _, channels) = denoiser.network, denoiser.image_shape
    return {
        **described(denoiser, "SD3Transformer2DModel", out_channels=0, **_WITHOUT),
        "sample_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": network.patch_size,
        "caption_projection_dim": network.hidden_size,
        "pos_embed_max_size": network.stored_positions,
        "dual_attention_layers": list(range(network.dual_blocks)),
        "qk_norm": "rms_norm" if network.qk_norm else None,
    }


DIFFUSERS = replace(
    FAMILY,
    name="SD3 of diffusers",
    table=_table_of_diffusers,
    recognise=_recognise_diffusers,
    config=Config("SD3Transformer2DModel", {}, _settings, _config),
)
"""The layout of `SD3Transformer2DModel`."""
