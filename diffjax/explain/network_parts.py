"""The parts of a network in the order in which they are evaluated, with their sizes."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.process.precond import Meaning
from diffjax.wiring import Wired


class Part(NamedTuple):
    """A part of a network, and what comes out of it.

    Attributes:
        name: as in the tree of parameters.
        kind: the class of the module.
        places: positions: pixels of a map, tokens, or 1 of a vector.
        side: the side of the square that so many places are: `√places`.
        width: numbers at each place.
        num_params: in it.
    """

    name: str
    kind: str
    places: int
    side: float
    width: int
    num_params: int


def network_parts(wired: Wired) -> list[Part]:
    """The modules that the network itself calls; shapes alone are computed."""
    outputs: dict[str, tuple[str, tuple[int, ...]]] = {}

    def noted(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output, path = call(*args, **kwargs), context.module.path
        leaves = [leaf for leaf in jax.tree.leaves(output) if getattr(leaf, "ndim", 0) > 1]
        if len(path) == 1 and context.method_name == "__call__" and leaves:
            outputs.setdefault(path[0], (type(context.module).__name__, leaves[0].shape))
        return output

    traits = wired.objective.traits
    labels = 1 + (traits.meaning is Meaning.AVERAGE_VELOCITY) + (traits.scales is not None)
    x = jax.ShapeDtypeStruct((1, *wired.input_shape), jnp.float32)
    label = jax.ShapeDtypeStruct((1, labels) if labels > 1 else (1,), jnp.float32)
    with nn.intercept_methods(noted):
        jax.eval_shape(wired.apply, wired.params_shape, x, label, wired.condition.abstract(1))
    found = []
    for name, (kind, (_, *places, width)) in outputs.items():
        sizes = [leaf.size for leaf in jax.tree.leaves(wired.params_shape.get(name, {}))]
        number = math.prod(places)
        found.append(Part(name, kind, number, math.sqrt(number), width, sum(sizes)))
    return found
