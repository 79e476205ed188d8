"""The layouts of Flux.1: the authors' files (black-forest-labs/flux), and folders of diffusers.

- The authors' queries, keys and values are thirds of one matrix, which has the hidden units of the
  MLP as well in blocks over one sequence. Modulations are shift, scale and gate, as here.
- diffusers (`FluxTransformer2DModel`) splits these matrices, and stores scale before shift after
  the blocks.

In both, pairs of neighbours in a head are rotated, and the numbers of a patch are ordered by
channel, row and column; here halves of a head are, and channels are last. The network predicts the
velocity `noise - data` at 1000 times the time, and 1000 times the guidance scale is embedded in Dev
and Fill. It attends to the padding of T5's states. The authors sample Dev with 50 steps of Euler,
on a grid whose shift depends on the number of tokens (3.16 at 1024 pixels), and Schnell with four
on the uniform grid. How times were drawn in training is not published.

Beside the input, Fill takes the latents of the masked image and the mask, 64 numbers in {0, 1} a
latent pixel: those of its 8x8 pixels, row by row.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffjax.conditions import Images, MaskedImages, Several, Tokens
from diffjax.models.dit.tables import blocks
from diffjax.models.flux.network import Flux
from diffjax.models.flux.sizes import SIZES
from diffjax.models.sd3.tables import (
    MLPS_OF_DIFFUSERS,
    depth_of,
    described,
    joint_of_diffusers,
    mapped,
    of_diffusers,
    orders,
    separate_heads,
    two_layers,
)
from diffjax.pretrained.family import Config, Denoiser, Family, Published
from diffjax.pretrained.tables import Row, Table, count, layer, within
from diffjax.pretrained.transforms import dense, keep, permute, side_by_side, split, then

_PATCH = 2
_BY_CHANNEL = (-1, _PATCH**2), (1, 0)
"""The order of the numbers of a patch: by channel there, with channels last here."""


def flux(
    side: int = 128,
    channels: int = 16,
    beside_channels: int = 0,
    context_width: int = 4096,
    pooled_width: int = 768,
    length: int = 512,
    **settings: Any,
) -> Denoiser:
    """A Flux with square latents of this side, 128 for images of 1024 pixels."""
    condition: Any = Tokens(length, context_width, pooled_width)
    if beside_channels:
        shape = side, side, beside_channels
        images = MaskedImages(shape, packed=True) if beside_channels > channels else Images(shape)
        condition = Several({"text": condition, "image": images}, kept=("image",), main="text")
    return Denoiser(Flux(**settings), (side, side, channels), condition)


def patches(theirs_in: str, theirs_out: str) -> tuple[Row, ...]:
    """The rows of the layers from patches and to patches."""
    by_channel = permute(*_BY_CHANNEL)
    return (
        Row(f"{theirs_in}.weight", "patch_embedding/kernel", permute(*_BY_CHANNEL, dense, axis=0)),
        Row(f"{theirs_in}.bias", "patch_embedding/bias"),
        *mapped(theirs_out, "final_out", by_channel),
    )


def _double(network: Flux) -> tuple[Row, ...]:
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
        rows += layer(f"{theirs}_mod.lin", f"{ours}modulation")
        rows += within(attention, f"{theirs}_attn", "attention")
        rows += within(two_layers(("0", "2"), ("up", "down")), f"{theirs}_mlp", f"{ours}mlp")
    return tuple(rows)


def _single(network: Flux) -> tuple[Row, ...]:
    """The rows of a block over one sequence, by the authors' names."""
    columns, heads = orders(network)
    width = network.hidden_size
    sizes = 3 * width, int(width * network.mlp_ratio)
    own = side_by_side(columns, keep)
    return (
        *layer("modulation.lin", "modulation"),
        Row(
            "linear1.weight",
            ("attention/qkv/kernel", "mlp/up/kernel"),
            then(split(sizes, dense), own),
        ),
        Row("linear1.bias", ("attention/qkv/bias", "mlp/up/bias"), then(split(sizes), own)),
        *layer("linear2", "out"),
        Row("norm.query_norm.scale", "attention/q_norm/scale", heads),
        Row("norm.key_norm.scale", "attention/k_norm/scale", heads),
    )


def _table(denoiser: Denoiser) -> Table:
    network = denoiser.network
    names = "in_layer", "out_layer"
    embedder = two_layers(names, ("hidden", "out"))
    return (
        *patches("img_in", "final_layer.linear"),
        *layer("txt_in", "context_embedding"),
        *within(embedder, "time_in", "conditioning"),
        *within(embedder, "guidance_in", "guidance"),
        *within(two_layers(names, ("pooled_hidden", "pooled_out")), "vector_in"),
        *blocks(network, _double(network), "double_blocks.{}".format, network.joint_stages),
        *blocks(
            network, _single(network), singles(network, "single_blocks"), network.single_stages
        ),
        *layer("final_layer.adaLN_modulation.1", "final_modulation"),
    )


def singles(network: Flux, name: str) -> Any:
    """The published names of blocks over one sequence, which are numbered from 0."""
    return lambda number: f"{name}.{number - network.depth}"


def sizes_in(
    shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str], guidance: str
) -> dict[str, Any]:
    """Width, depths, heads and guidance, from the shapes of tensors with these names."""
    hidden_size = shapes[names["in"]][0]
    found = {
        "hidden_size": hidden_size,
        "depth": depth_of(names["double"], shapes),
        "single_depth": count(names["single"], shapes),
        "num_heads": hidden_size // shapes[names["head"]][0],
        "context_width": shapes[names["context"]][1],
    }
    return found if guidance in shapes else found | {"embedded_guidance": 0.0}


def _found(
    shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str], guidance: str
) -> dict[str, Any]:
    numbers = shapes[names["in"]][1] // _PATCH**2
    outputs = shapes[names["out"]][0] // _PATCH**2
    return sizes_in(shapes, names, guidance) | {
        "channels": outputs,
        "beside_channels": numbers - outputs,
        "pooled_width": shapes[names["pooled"]][1],
    }


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    names = {
        "in": "img_in.weight",
        "out": "final_layer.linear.weight",
        "double": "double_blocks.{i}.img_mod.lin.weight",
        "single": "single_blocks.{i}.linear1.weight",
        "head": "double_blocks.0.img_attn.norm.query_norm.scale",
        "context": "txt_in.weight",
        "pooled": "vector_in.in_layer.weight",
    }
    return _found(shapes, names, "guidance_in.in_layer.weight")


def _published(denoiser: Denoiser) -> Published:
    distilled = not denoiser.network.embedded_guidance
    return Published(
        objective="objective=sd3",
        solver="euler",
        grid="uniform" if distilled else "shifted",
        num_steps=4 if distilled else 50,
        guidance_scale=1.0,
        codec="flux-vae",
        condition_dropout=0.0,
    )


FAMILY = Family(
    "Flux.1",
    flux,
    SIZES,
    _table,
    _recognise,
    lambda denoiser: denoiser.inputs,
    published=_published,
)


def single_of_diffusers(network: Flux) -> tuple[Row, ...]:
    """The rows of a block over one sequence, by the names of diffusers."""
    columns, heads = orders(network)
    separate = tuple(f"attn.to_{part}" for part in "qkv")
    return (
        *layer("norm.linear", "modulation"),
        *separate_heads(separate, "attention/qkv", columns),
        Row("attn.norm_q.weight", "attention/q_norm/scale", heads),
        Row("attn.norm_k.weight", "attention/k_norm/scale", heads),
        *layer("proj_mlp", "mlp/up"),
        *layer("proj_out", "out"),
    )


def _table_of_diffusers(denoiser: Denoiser) -> Table:
    network, joint = denoiser.network, "transformer_blocks"
    double = *joint_of_diffusers(network), *MLPS_OF_DIFFUSERS
    return (
        *patches("x_embedder", "proj_out"),
        *of_diffusers(),
        *blocks(network, double, f"{joint}.{{}}".format, network.joint_stages),
        *blocks(
            network,
            single_of_diffusers(network),
            singles(network, f"single_{joint}"),
            network.single_stages,
        ),
    )


def _recognise_diffusers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    names = {
        "in": "x_embedder.weight",
        "out": "proj_out.weight",
        "double": "transformer_blocks.{i}.attn.add_q_proj.weight",
        "single": "single_transformer_blocks.{i}.proj_mlp.weight",
        "head": "transformer_blocks.0.attn.norm_q.weight",
        "context": "context_embedder.weight",
        "pooled": "time_text_embed.text_embedder.linear_1.weight",
    }
    return _found(shapes, names, "time_text_embed.guidance_embedder.linear_1.weight")


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    heads, width = int(config["num_attention_heads"]), int(config["attention_head_dim"])
    numbers = int(config["in_channels"])
    outputs = int(config.get("out_channels") or numbers)
    if numbers % _PATCH**2 or outputs % _PATCH**2 or outputs > numbers:
        raise ValueError(f"in_channels={numbers} and out_channels={outputs} are no packed patches")
    beside = (numbers - outputs) // _PATCH**2
    guidance = (30.0 if beside else 3.5) if config["guidance_embeds"] else 0.0
    return {
        "channels": outputs // _PATCH**2,
        "beside_channels": beside,
        "hidden_size": heads * width,
        "depth": int(config["num_layers"]),
        "single_depth": int(config["num_single_layers"]),
        "num_heads": heads,
        "rotary_axes": tuple(int(axis) for axis in config["axes_dims_rope"]),
        "embedded_guidance": guidance,
        "length": 512 if guidance else 256,
        "context_width": int(config["joint_attention_dim"]),
        "pooled_width": int(config["pooled_projection_dim"]),
    }


_WITHOUT = {
    "stored_positions": 0, "dual_blocks": 0, "shared_modulation": False, "bias": True,
    "mlp": "gelu", "mlp_ratio": 4.0, "patch_size": _PATCH, "qk_norm": True, "max_period": 10_000.0,
}  # fmt: skip


def _config(denoiser: Denoiser) -> dict[str, Any]:
    network, beside = denoiser.network, 0
    outputs = denoiser.image_shape[-1] * _PATCH**2
    if isinstance(denoiser.condition, Several):
        parts: Mapping[str, Any] = denoiser.condition.parts
        text, images = parts["text"], parts["image"]
        denoiser, beside = replace(denoiser, condition=text), images.shape[-1]
    return {
        **described(denoiser, "FluxTransformer2DModel", out_channels=0, **_WITHOUT),
        "in_channels": outputs + beside * _PATCH**2,
        "out_channels": outputs if beside else None,
        "num_single_layers": network.single_depth,
        "guidance_embeds": bool(network.embedded_guidance),
        "axes_dims_rope": list(network.rotary_axes),
    }


DIFFUSERS = replace(
    FAMILY,
    name="Flux.1 of diffusers",
    table=_table_of_diffusers,
    recognise=_recognise_diffusers,
    config=Config("FluxTransformer2DModel", {"patch_size": 1}, _settings, _config),
)
"""The layout of `FluxTransformer2DModel`."""
