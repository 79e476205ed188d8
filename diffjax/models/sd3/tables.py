"""Parts of the tables of foreign names of MMDiT and those that follow it."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from diffjax.conditions import Tokens
from diffjax.errors import UserError
from diffjax.models.dit.tables import of_queries_and_keys, pairs_of_neighbours
from diffjax.models.sd3.network import MMDiT
from diffjax.pretrained.family import Denoiser
from diffjax.pretrained.tables import Row, count, layer, within
from diffjax.pretrained.transforms import Transform, dense, keep, merge, reorder, swap_halves, then


def mapped(theirs: str, ours: str, columns: Transform) -> tuple[Row, Row]:
    """The rows of a layer whose outputs are in another order."""
    return (
        Row(f"{theirs}.weight", f"{ours}/kernel", then(dense, columns)),
        Row(f"{theirs}.bias", f"{ours}/bias", columns),
    )


def orders(network: MMDiT) -> tuple[Transform, Transform]:
    """The order of the columns of queries, keys and values, and of a norm in a head.

    Pairs of neighbours are rotated in published networks, and halves of a head here.
    """
    if not network.rotary_axes:
        return keep, keep
    order = pairs_of_neighbours(network.hidden_size // network.num_heads)
    return reorder(of_queries_and_keys(network.num_heads, order)), reorder(order)


def separate_heads(theirs: Sequence[str], ours: str, columns: Transform) -> tuple[Row, Row]:
    """The rows of queries, keys and values that are three layers in files."""
    return (
        Row(
            tuple(f"{name}.weight" for name in theirs),
            f"{ours}/kernel",
            then(merge(3, dense), columns),
        ),
        Row(tuple(f"{name}.bias" for name in theirs), f"{ours}/bias", then(merge(3), columns)),
    )


def two_layers(theirs: Sequence[str], ours: Sequence[str]) -> tuple[Row, ...]:
    """The rows of two layers, one after the other."""
    return tuple(row for pair in zip(theirs, ours, strict=True) for row in layer(*pair))


def joint_of_diffusers(network: MMDiT, context_ends: bool = False) -> tuple[Row, ...]:
    """The rows of a block with two sequences but for its MLPs, by the names of diffusers.

    Where a modulation has no gate, the scale comes before the shift there.
    """
    columns, heads = orders(network)
    own = tuple(f"to_{part}" for part in "qkv")
    added = tuple(f"add_{part}_proj" for part in "qkv")
    attention = (
        *separate_heads(own, "qkv", columns),
        *layer("to_out.0", "out"),
        Row("norm_q.weight", "q_norm/scale", heads),
        Row("norm_k.weight", "k_norm/scale", heads),
    )
    order = swap_halves if context_ends else keep
    return (
        *layer("norm1.linear", "modulation"),
        *mapped("norm1_context.linear", "context_modulation", order),
        *within(attention, "attn", "attention"),
        *within(attention, "attn2", "image_attention"),
        *within(separate_heads(added, "context_qkv", columns), "attn", "attention"),
        *layer("attn.to_add_out", "attention/context_out"),
        Row("attn.norm_added_q.weight", "attention/context_q_norm/scale", heads),
        Row("attn.norm_added_k.weight", "attention/context_k_norm/scale", heads),
    )


_MLP_OF_DIFFUSERS = two_layers(("net.0.proj", "net.2"), ("up", "down"))
MLPS_OF_DIFFUSERS = (
    *within(_MLP_OF_DIFFUSERS, "ff", "mlp"),
    *within(_MLP_OF_DIFFUSERS, "ff_context", "context_mlp"),
)
"""The rows of the MLPs of a block with two sequences."""


def of_diffusers(embedders: str = "time_text_embed") -> tuple[Row, ...]:
    """The rows around the blocks that all networks of diffusers have.

    Args:
        embedders: the name of what is added to the conditioning.
    """
    two = "linear_1", "linear_2"
    rows = (
        *within(two_layers(two, ("hidden", "out")), "timestep_embedder", "conditioning"),
        *within(two_layers(two, ("hidden", "out")), "guidance_embedder", "guidance"),
        *within(two_layers(two, ("pooled_hidden", "pooled_out")), "text_embedder"),
    )
    return (
        *within(rows, embedders),
        *layer("context_embedder", "context_embedding"),
        *mapped("norm_out.linear", "final_modulation", swap_halves),
    )


def depth_of(pattern: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The number of blocks, at least one.

    Raises:
        KeyError: there is none.
    """
    found = count(pattern, shapes)
    if not found:
        raise KeyError(pattern)
    return found


def described(denoiser: Denoiser, class_name: str, **needed: Any) -> dict[str, Any]:
    """The entries of `config.json` that all networks of diffusers have.

    Raises:
        UserError: the network has other settings than such a config describes.
    """
    network, condition = denoiser.network, cast(Tokens, denoiser.condition)
    same = {"num_classes": 0, "masked": False, **needed}
    for name, value in same.items():
        if getattr(network, name) != value:
            raise UserError(f"{class_name} has {name}={value!r}, not {getattr(network, name)!r}")
    return {
        "attention_head_dim": network.hidden_size // network.num_heads,
        "num_attention_heads": network.num_heads,
        "num_layers": network.depth,
        "joint_attention_dim": condition.width,
        "pooled_projection_dim": condition.pooled_width,
    }
