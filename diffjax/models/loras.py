"""LoRA between files and networks, in whichever layout of a family names the layers of a file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
from flax import traverse_util

from diffjax.errors import UserError
from diffjax.models.families import LAYOUTS, Found
from diffjax.models.layers.common import in_stack, is_stacked
from diffjax.models.low_rank import KERNEL, A, B, LoraLayers, lora_layers
from diffjax.pretrained.factors import Factors, to_ours, to_theirs
from diffjax.pretrained.family import Denoiser, Family
from diffjax.pretrained.lora import (
    Lora,
    LowRank,
    changes_by_name,
    merged,
    of_another_network,
    unknown_layers,
)
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
            layout, family, state = _layout_with(found, lora, part)
            if family is not found.family:
                state = family.to_theirs(found.params(), found.network)
            state = merged(state, lora, part, found.source)
            if lora.weight:
                found = found._replace(layout=layout, family=family, state=state)
    return found


def _layout_with(found: Found, lora: Lora, part: str) -> tuple[str, Family, Mapping[str, Any]]:
    """The first layout whose names a file has, with its tensors or shapes; that of the weights if
    it has.

    Raises:
        UserError: no layout has all the layers.
    """
    nearest: tuple[int, Mapping[str, Any]] | None = None
    for layout, family, state in chain([(found.layout, found.family, found.state)], _others(found)):
        unknown = len(unknown_layers(lora, part, state))
        if not unknown:
            return layout, family, state
        if nearest is None or unknown < nearest[0]:
            nearest = unknown, state
    assert nearest is not None
    raise of_another_network(lora, part, nearest[1], found.source)


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


def factors_of(found: Found, loras: Sequence[Lora], part: str) -> dict[str, Factors]:
    """A and B of files of LoRA by the paths of layers here, those of several files side by side.

    Weights and scales are in B. Blocks are apart, also where the network stacks them.

    Args:
        found: the weights of the network.
        loras: the files with their weights.
        part: the part of a pipeline that the network is.

    Raises:
        UserError: a file is of another network, or of something else than a kernel.
    """
    denoiser = _separate(found.network)
    kernels: Any = traverse_util.flatten_dict(found.family.shapes(denoiser), sep="/")
    sides: dict[str, list[Factors]] = {}
    for lora in (lora for lora in loras if part in lora.parts):
        _, family, state = _layout_with(found, lora, part)
        changes = changes_by_name(state, lora, part, found.source)
        for row in applied(family.table(denoiser), kernels):
            of_row = [changes.get(name) for name in row.theirs]
            if not any(of_row):
                continue
            layers = [path.removesuffix(f"/{KERNEL}") for path in row.ours]
            if layers[0] == row.ours[0]:
                raise UserError(f"the LoRA {lora.file}: {layers[0]} is no kernel; merge it")
            pairs = [None if x is None else _weighted(x, lora.weight) for x in of_row]
            try:
                shapes = [kernels[path].shape for path in row.ours]
                found_here = to_ours(row.transform, shapes, pairs)
            except ValueError as error:
                raise UserError(f"the LoRA {lora.file}: {row.theirs[0]} {error}") from error
            for layer, pair in zip(layers, found_here, strict=True):
                sides.setdefault(layer, []).extend([pair] if pair else [])
    return {
        layer: (np.concatenate([a for a, _ in pairs], -1), np.concatenate([b for _, b in pairs]))
        for layer, pairs in sides.items()
        if pairs
    }


def with_factors(params: Any, factors: Mapping[str, Factors]) -> tuple[Any, LoraLayers]:
    """Parameters with A and B beside their kernels, and the layers that have them.

    Args:
        params: the parameters of a network, whose blocks may be stacked.
        factors: A and B by layer, of any ranks, from `factors_of`.

    Returns:
        The parameters, with zeros where a rank is less than the largest, or one of stacked blocks
        has no change; and what a network is evaluated with (`LoraLayers.on`).
    """
    leaves: Any = traverse_util.flatten_dict(params, sep="/")
    rank, layers, sides = max(len(b) for _, b in factors.values()), [], {}
    for path, kernel in leaves.items():
        layer = path.removesuffix(f"/{KERNEL}")
        stacked = is_stacked(layer)
        count = kernel.shape[0] if stacked and layer != path else 1
        pairs = [factors.get(in_stack(layer, i) if stacked else layer) for i in range(count)]
        if layer == path or not any(pairs):
            continue
        shape = kernel.shape[1:] if stacked else kernel.shape
        a, b = np.zeros((count, *shape[:-1], rank), "f"), np.zeros((count, rank, shape[-1]), "f")
        for i, pair in enumerate(pairs):
            if pair is not None:
                a[i, ..., : len(pair[1])], b[i, : len(pair[1])] = pair
        layers.append(layer)
        sides |= {f"{layer}/{A}": a if stacked else a[0], f"{layer}/{B}": b if stacked else b[0]}
    lora = LoraLayers(rank=rank, layers=",".join(layers))
    return traverse_util.unflatten_dict({**leaves, **sides}, sep="/"), lora


def _weighted(change: LowRank, weight: float) -> Factors:
    down, up = (np.asarray(x).astype(np.float32) for x in (change.down, change.up))
    return down, up * np.float32(weight * change.scale)


def _separate(denoiser: Denoiser) -> Denoiser:
    """The network whose blocks are not stacked."""
    if "scan" not in vars(denoiser.network):
        return denoiser
    return replace(denoiser, network=denoiser.network.clone(scan=False))


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
    denoiser, factors, changes = _separate(denoiser), _factors(params), []
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
