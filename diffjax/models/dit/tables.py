"""Parts of the tables of foreign names of diffusion transformers."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from diffjax.models.dit.network import DiT
from diffjax.models.dit.patches import positions_2d
from diffjax.models.dit.stages import Stage
from diffjax.pretrained.family import Denoiser
from diffjax.pretrained.tables import Row, layer, several
from diffjax.pretrained.transforms import (
    Transform,
    constant,
    conv,
    dense,
    keep,
    reorder,
    reshape,
    split,
    stack,
    then,
)


def blocks(
    network: Any,
    rows: Iterable[Row],
    name_of: Callable[[int], str] = "blocks.{}".format,
    stages: Iterable[Stage] | None = None,
) -> Iterator[Row]:
    """The rows of all blocks, separate or stacked.

    Args:
        network: the network.
        rows: the rows of one block, with names within it on both sides.
        name_of: the number of a block -> its published name.
        stages: which blocks these are; by default all of a DiT.
    """
    for stage, row in itertools.product(network.stages if stages is None else stages, rows):
        names, ours = several(row.theirs), several(row.ours)
        published = [name_of(i) for i in range(stage.start, stage.stop)]
        if network.scan:
            every = tuple(f"{block}.{name}" for block in published for name in names)
            here = tuple(f"{stage.stack}/{name}" for name in ours)
            yield Row(every, here, stack(row.transform, len(names)))
            continue
        for block, own in zip(published, stage.blocks, strict=True):
            there = tuple(f"{block}.{name}" for name in names)
            yield Row(there, tuple(f"{own}/{name}" for name in ours), row.transform)


def dit_block(
    network: DiT, order: np.ndarray | None = None, modulation: str = "adaLN_modulation.1"
) -> tuple[Row, ...]:
    """The rows of a block that has the names of DiT's, but for its MLP.

    Args:
        network: the network.
        order: the published order of the numbers in a head of queries and keys, for networks with
            rotary positions: number i here is number `order[i]` there.
        modulation: the published name of the layer that modulates.
    """
    columns = keep if order is None else reorder(of_queries_and_keys(network.num_heads, order))
    heads = keep if order is None else reorder(order)
    return (
        *layer(modulation, "modulation"),
        Row("attn.qkv.weight", "attention/qkv/kernel", then(dense, columns)),
        Row("attn.qkv.bias", "attention/qkv/bias", columns),
        Row("attn.q_norm.weight", "attention/q_norm/scale", heads),
        Row("attn.k_norm.weight", "attention/k_norm/scale", heads),
        *layer("attn.proj", "attention/out"),
        Row("norm1.weight", "norm_1/scale"),
        Row("norm2.weight", "norm_2/scale"),
    )


def separate_swiglu() -> tuple[Row, ...]:
    """The rows of a gated MLP without biases, with the names of Llama."""
    pairs = (("mlp.w1", "mlp/gate"), ("mlp.w3", "mlp/up"), ("mlp.w2", "mlp/down"))
    return tuple(Row(f"{theirs}.weight", f"{ours}/kernel", dense) for theirs, ours in pairs)


def gelu_mlp() -> tuple[Row, ...]:
    """The rows of an MLP with one layer up and one down."""
    return *layer("mlp.fc1", "mlp/up"), *layer("mlp.fc2", "mlp/down")


def fused_swiglu() -> tuple[Row, ...]:
    """The rows of a gated MLP whose layers up are one in files, the gate first."""
    ours = "mlp/gate", "mlp/up"
    return (
        Row("mlp.w12.weight", tuple(f"{name}/kernel" for name in ours), split(2, dense)),
        Row("mlp.w12.bias", tuple(f"{name}/bias" for name in ours), split(2)),
        *layer("mlp.w3", "mlp/down"),
    )


def conditioning() -> tuple[Row, ...]:
    """The rows of the embeddings of noise label and class, of a network with DiT's names."""
    return (
        *layer("t_embedder.mlp.0", "conditioning/hidden"),
        *layer("t_embedder.mlp.2", "conditioning/out"),
        Row("y_embedder.embedding_table.weight", "conditioning/label/embedding"),
    )


def final_layers() -> tuple[Row, ...]:
    """The rows of the layers after the blocks, of a network with DiT's names."""
    return (
        Row("final_layer.norm_final.weight", "final_norm/scale"),
        *layer("final_layer.adaLN_modulation.1", "final_modulation"),
        *layer("final_layer.linear", "final_out"),
    )


def fixed_positions(denoiser: Denoiser) -> Row:
    """The row of fixed positions, which files hold as well."""
    height, width, _ = denoiser.image_shape
    size, patch = denoiser.network.hidden_size, denoiser.network.patch_size
    return Row(
        "pos_embed",
        (),
        constant(lambda: positions_2d(height // patch, width // patch, size)[None]),
    )


def patches_by_conv(features: int, patch: int) -> Transform:
    """A convolution over patches there, `[features, C, p, p]`, a dense layer of them here."""
    return then(conv, reshape(ours=(-1, features), theirs=(patch, patch, -1, features)))


def of_queries_and_keys(num_heads: int, order: np.ndarray) -> np.ndarray:
    """The order of all columns of queries, keys and values, by that within a head.

    Example:
        >>> of_queries_and_keys(1, np.array([1, 0])).tolist()
        [1, 0, 3, 2, 4, 5]
    """
    width = len(order)
    heads = np.arange(2 * num_heads)[:, None] * width + order
    values = np.arange(2 * num_heads * width, 3 * num_heads * width)
    return np.concatenate([heads.ravel(), values])


def pairs_of_neighbours(head_width: int) -> np.ndarray:
    """The published order of the numbers in a head where pairs of neighbours are rotated.

    Here the two of a pair are half a head apart.

    Example:
        >>> pairs_of_neighbours(8).tolist()
        [0, 2, 4, 6, 1, 3, 5, 7]
    """
    return np.arange(head_width).reshape(-1, 2).T.ravel()
