"""LoRA between files and networks, in whichever layout of a family names the layers of a file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from flax import traverse_util

from diffjax.errors import UserError
from diffjax.models.families import LAYOUTS, Found
from diffjax.models.layers import in_stack, is_stacked
from diffjax.models.low_rank import KERNEL, A, B, lora_layers
from diffjax.pretrained.factors import Factors, to_theirs
from diffjax.pretrained.family import Denoiser, Family
from diffjax.pretrained.lora import Lora, LowRank, merged, of_another_network, unknown_layers
from diffjax.pretrained.tables import applied, published_shapes


def with_loras(found: Found, loras: Sequence[Lora], part: str) -> Found:
    """Published weights with the changes of LoRA files added, `W + sum(weight * scale * B A)`.

    The layers of a file are named as in one of the layouts of the family: that of diffusers, or
    that of the authors, as kohya's files for SDXL and Flux. Weights in another layout are converted
    first. They are changed as they are read, and parameters that no file names stay as they are.

    Args:
        found: the weights.
        loras: the files with their weights; one of weight 0 changes nothing, but has to fit.
        part: the part of a pipeline that the weights are of, as `network` or `text_encoder`.

    Raises:
        UserError: a file is of another network.
    """
    for lora in loras:
        if part in lora.parts:
            there = _in_a_layout_of(found, lora, part)
            state = merged(there.state, lora, part, there.source)
            found = there._replace(state=state) if lora.weight else found
    return found


def _in_a_layout_of(found: Found, lora: Lora, part: str) -> Found:
    """The weights in the first layout whose names a file has; the one that they are in if it has.

    Raises:
        UserError: no layout has all the layers.
    """
    if not (unknown := unknown_layers(lora, part, found.state)):
        return found
    fewest, nearest = len(unknown), found.state
    for layout, family, shapes in _others(found):
        if not (unknown := unknown_layers(lora, part, shapes)):
            state = family.to_theirs(found.params(), found.network)
            return found._replace(layout=layout, family=family, state=state)
        if len(unknown) < fewest:
            fewest, nearest = len(unknown), shapes
    raise of_another_network(lora, part, nearest, found.source)


def _others(found: Found) -> Iterator[tuple[str, Family, Mapping[str, Any]]]:
    """The other layouts of a network, with the names and shapes that its tensors have there."""
    expected = found.family.shapes(found.network)
    for layouts in LAYOUTS.values():
        if any(family is found.family for family in layouts.values()):
            for name, family in layouts.items():
                if family is not found.family:
                    try:
                        shapes = published_shapes(family.table(found.network), expected)
                    except ValueError:  # This network has parts that the layout has no names for.
                        continue
                    yield name, family, shapes


def published_changes(
    params: Any, scale: float, layout: Family, denoiser: Denoiser
) -> list[LowRank]:
    """The LoRA of a network by the names of published tensors, for a file.

    Args:
        params: the parameters, with A and B beside kernels (`diffjax.models.low_rank`).
        scale: alpha / rank.
        layout: one of those of the network.
        denoiser: the network.

    Returns:
        The changes in the order of the layout. Layers that a layout has in one, as queries, keys
        and values, share their matrices.

    Raises:
        UserError: the layout has no matrix for a layer.
    """
    if "scan" in vars(denoiser.network):
        denoiser = replace(denoiser, network=denoiser.network.clone(scan=False))
    factors, changes = _factors(params), []
    shapes: Any = traverse_util.flatten_dict(layout.shapes(denoiser), sep="/")
    for row in applied(layout.table(denoiser), shapes):
        pairs = [factors.get(path.removesuffix(f"/{KERNEL}")) for path in row.ours]
        if not any(path.endswith(f"/{KERNEL}") for path in row.ours) or not any(pairs):
            continue
        try:
            found = to_theirs(row.transform, [shapes[path].shape for path in row.ours], pairs)
        except ValueError as error:
            raise UserError(
                f"{layout.name} has no LoRA of {row.ours[0]}: {row.theirs[0]} {error}"
            ) from error
        for name, pair in zip(row.theirs, found, strict=True):
            if pair is not None:
                changes.append(LowRank(name.removesuffix(".weight"), *pair, scale))
    return changes


def _factors(params: Any) -> dict[str, Factors]:
    """A and B of each layer by its path, those of stacked blocks apart."""
    leaves: Any = traverse_util.flatten_dict(params, sep="/")
    found: dict[str, Factors] = {}
    for layer in lora_layers(params):
        a, b = (np.asarray(leaves[f"{layer}/{name}"]) for name in (A, B))
        if is_stacked(layer):
            found |= {in_stack(layer, i): (a[i], b[i]) for i in range(len(a))}
        else:
            found[layer] = a, b
    return found
