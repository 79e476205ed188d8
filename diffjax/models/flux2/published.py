"""The layouts of Flux.2: the authors' files (black-forest-labs/flux2), and folders of diffusers.

- The authors' queries, keys and values are thirds of one matrix, which has both halves of the gated
  MLP as well in blocks over one sequence, the gates first. Modulations are as here.
- diffusers (`Flux2Transformer2DModel`) splits queries, keys and values of blocks over two sequences
  alone, and stores scale before shift after the blocks.

Pairs of neighbours in a head are rotated there, and halves of a head here. Latents are patches of
2x2 with 128 channels already (`AutoencoderKLFlux2`). The network predicts the velocity
`noise - data` at 1000 times the time, and 1000 times the guidance scale is embedded in Dev. The
authors sample Dev with 50 steps of Euler on a grid whose shift depends on the numbers of tokens and
of steps, and Klein with four. How times were drawn in training is not published. Images to refer to
(the first axis of the rotation) are not taken.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffjax.conditions import Tokens
from diffjax.models.dit.tables import blocks
from diffjax.models.flux.published import singles, sizes_in
from diffjax.models.flux2.network import Flux2
from diffjax.models.flux2.sizes import SIZES
from diffjax.models.sd3.tables import (
    described,
    joint_of_diffusers,
    mapped,
    of_diffusers,
    orders,
    two_layers,
)
from diffjax.pretrained.family import Config, Denoiser, Family, Published
from diffjax.pretrained.tables import Row, Table, layer, within
from diffjax.pretrained.transforms import dense, keep, side_by_side, split, then

_MLP_RATIO = 3.0
"""The authors count the hidden units that are left after the gates: two thirds of ours."""


def flux2(
    side: int = 64,
    channels: int = 128,
    context_width: int = 15_360,
    length: int = 512,
    **settings: Any,
) -> Denoiser:
    """A Flux.2 with square latents of this side, 64 for images of 1024 pixels."""
    return Denoiser(Flux2(**settings), (side, side, channels), Tokens(length, context_width))


def _gated(up: str, down: str, ours: str) -> tuple[Row, Row]:
    """The rows of a gated MLP whose layers up are one in files, the gate first."""
    both = f"{ours}/gate/kernel", f"{ours}/up/kernel"
    return Row(f"{up}.weight", both, split(2, dense)), layer(down, f"{ours}/down")[0]


def _single(network: Flux2, up: str, down: str, norms: tuple[str, str]) -> tuple[Row, ...]:
    """The rows of a block over one sequence, by these names."""
    columns, heads = orders(network)
    width = network.hidden_size
    hidden = int(width * _MLP_RATIO)
    parts = split((3 * width, hidden, hidden), dense)
    return (
        Row(
            f"{up}.weight",
            ("attention/qkv/kernel", "mlp/gate/kernel", "mlp/up/kernel"),
            then(parts, side_by_side(columns, keep, keep)),
        ),
        layer(down, "out")[0],
        Row(norms[0], "attention/q_norm/scale", heads),
        Row(norms[1], "attention/k_norm/scale", heads),
    )


def _double(network: Flux2) -> tuple[Row, ...]:
    """The rows of a block with two sequences, by the authors' names."""
    columns, heads = orders(network)
    rows: list[Row] = []
    for theirs, ours in (("img", ""), ("txt", "context_")):
        attention = (
            *mapped("qkv", f"{ours}qkv", columns),
            *layer("proj", f"{ours}out"),
            Row("norm.query_norm.scale", f"{ours}q_norm/scale", heads),
            Row("norm.key_norm.scale", f"{ours}k_norm/scale", heads),
        )
        rows += within(attention, f"{theirs}_attn", "attention")
        rows += _gated(f"{theirs}_mlp.0", f"{theirs}_mlp.2", f"{ours}mlp")
    return tuple(rows)


def _table(denoiser: Denoiser) -> Table:
    network = denoiser.network
    norms = "norm.query_norm.scale", "norm.key_norm.scale"
    embedder = two_layers(("in_layer", "out_layer"), ("hidden", "out"))
    single = _single(network, "linear1", "linear2", norms)
    return (
        *layer("img_in", "patch_embedding"),
        *layer("txt_in", "context_embedding"),
        *within(embedder, "time_in", "conditioning"),
        *within(embedder, "guidance_in", "guidance"),
        *layer("double_stream_modulation_img.lin", "modulation"),
        *layer("double_stream_modulation_txt.lin", "context_modulation"),
        *layer("single_stream_modulation.lin", "single_modulation"),
        *blocks(network, _double(network), "double_blocks.{}".format, network.joint_stages),
        *blocks(network, single, singles(network, "single_blocks"), network.single_stages),
        *layer("final_layer.adaLN_modulation.1", "final_modulation"),
        *layer("final_layer.linear", "final_out"),
    )


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    names = {
        "in": "img_in.weight",
        "shared": "single_stream_modulation.lin.weight",
        "double": "double_blocks.{i}.img_attn.qkv.weight",
        "single": "single_blocks.{i}.linear1.weight",
        "head": "double_blocks.0.img_attn.norm.query_norm.scale",
        "context": "txt_in.weight",
    }
    return _found(shapes, names, "guidance_in.in_layer.weight")


def _found(
    shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str], guidance: str
) -> dict[str, Any]:
    shapes[names["shared"]]  # Those of Flux.1 have a modulation in each block, and lack it.
    return sizes_in(shapes, names, guidance) | {"channels": shapes[names["in"]][1]}


def _published(denoiser: Denoiser) -> Published:
    distilled = not denoiser.network.embedded_guidance
    return Published(
        objective="objective=sd3",
        solver="euler",
        grid="shifted",
        num_steps=4 if distilled else 50,
        guidance_scale=1.0,
        codec="flux2-vae",
        condition_dropout=0.0,
    )


FAMILY = Family(
    "Flux.2",
    flux2,
    SIZES,
    _table,
    _recognise,
    lambda denoiser: denoiser.inputs,
    published=_published,
)


def _table_of_diffusers(denoiser: Denoiser) -> Table:
    network, joint = denoiser.network, "transformer_blocks"
    double = (
        *joint_of_diffusers(network),
        *_gated("ff.linear_in", "ff.linear_out", "mlp"),
        *_gated("ff_context.linear_in", "ff_context.linear_out", "context_mlp"),
    )
    norms = "attn.norm_q.weight", "attn.norm_k.weight"
    single = _single(network, "attn.to_qkv_mlp_proj", "attn.to_out", norms)
    return (
        *layer("x_embedder", "patch_embedding"),
        *of_diffusers("time_guidance_embed"),
        *layer("double_stream_modulation_img.linear", "modulation"),
        *layer("double_stream_modulation_txt.linear", "context_modulation"),
        *layer("single_stream_modulation.linear", "single_modulation"),
        *blocks(network, double, f"{joint}.{{}}".format, network.joint_stages),
        *blocks(network, single, singles(network, f"single_{joint}"), network.single_stages),
        *layer("proj_out", "final_out"),
    )


def _recognise_diffusers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    names = {
        "in": "x_embedder.weight",
        "shared": "single_stream_modulation.linear.weight",
        "double": "transformer_blocks.{i}.attn.add_q_proj.weight",
        "single": "single_transformer_blocks.{i}.attn.to_qkv_mlp_proj.weight",
        "head": "transformer_blocks.0.attn.norm_q.weight",
        "context": "context_embedder.weight",
    }
    return _found(shapes, names, "time_guidance_embed.guidance_embedder.linear_1.weight")


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    heads, width = int(config["num_attention_heads"]), int(config["attention_head_dim"])
    if config.get("out_channels") not in (None, config["in_channels"]):
        raise ValueError(f"out_channels={config['out_channels']} are not those of the input")
    return {
        "channels": int(config["in_channels"]),
        "hidden_size": heads * width,
        "depth": int(config["num_layers"]),
        "single_depth": int(config["num_single_layers"]),
        "num_heads": heads,
        "rotary_axes": tuple(int(axis) for axis in config["axes_dims_rope"]),
        "max_period": float(config["rope_theta"]),
        # The first published folders are of Dev, and lack the entry.
        "embedded_guidance": 4.0 if config.get("guidance_embeds", True) else 0.0,
        "context_width": int(config["joint_attention_dim"]),
    }


_WITH = {
    "stored_positions": 0, "dual_blocks": 0, "shared_modulation": True, "bias": False,
    "mlp": "swiglu", "mlp_ratio": 4.5, "patch_size": 1, "qk_norm": True,
}  # fmt: skip
_FIXED = {"patch_size": 1, "timestep_guidance_channels": 256, "mlp_ratio": _MLP_RATIO, "eps": 1e-6}


def _config(denoiser: Denoiser) -> dict[str, Any]:
    network = denoiser.network
    entries = described(denoiser, "Flux2Transformer2DModel", out_channels=0, **_WITH)
    entries.pop("pooled_projection_dim")
    return {
        **entries,
        "in_channels": denoiser.image_shape[-1],
        "out_channels": None,
        "num_single_layers": network.single_depth,
        "guidance_embeds": bool(network.embedded_guidance),
        "axes_dims_rope": list(network.rotary_axes),
        "rope_theta": int(network.max_period),
    }


DIFFUSERS = replace(
    FAMILY,
    name="Flux.2 of diffusers",
    table=_table_of_diffusers,
    recognise=_recognise_diffusers,
    config=Config("Flux2Transformer2DModel", _FIXED, _settings, _config),
)
"""The layout of `Flux2Transformer2DModel`."""
