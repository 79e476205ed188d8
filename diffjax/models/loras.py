"""LoRA on recognised weights, in whichever layout of a family names the layers that a file does."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffjax.models.families import LAYOUTS, Found
from diffjax.pretrained.family import Family
from diffjax.pretrained.lora import Lora, merged, of_another_network, unknown_layers
from diffjax.pretrained.tables import published_shapes


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
