"""Two time scales: some parameters are updated in each step, the others in every few."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from diffjax.errors import UserError
from diffjax.optimizers.base import Optimizer, at_params


class Turns(NamedTuple):
    """The state of both time scales.

    Attributes:
        count: `[]` int32, steps so far.
        seldom: the optimizer's of those that are updated in every few steps.
        always: the optimizer's of the others.
    """

    count: Array
    seldom: Any
    always: Any


def in_turns(
    optimizer: Optimizer, every: int, always: Collection[str], rate: float = 1.0
) -> Optimizer:
    """The optimizer with a state for each of two parts of the parameters, one updated seldom.

    Both begin with an update. In the steps between, moments and schedule of the part that is not
    updated stand still, so it has the optimizer that it would have alone. A gradient is clipped by
    the norm of its own part.

    Args:
        optimizer: the optimizer of both parts.
        every: steps of the one part between updates of the other; 0 is one optimizer for all.
        always: names at the top of the tree of the parameters that are updated in each step.
        rate: the factor of their learning rate.

    Raises:
        UserError: an optimizer that takes gradients elsewhere than at the parameters.

    Example:
        >>> from diffjax.optimizers.descent import descent
        >>> params = {"network": jnp.zeros(1), "score": jnp.zeros(1)}
        >>> step = in_turns(descent(9, warmup_steps=0), 2, ("score",)).transform
        >>> moved, state = step.update({"network": jnp.ones(1), "score": jnp.ones(1)},
        ...                            step.init(params), params)
        >>> moved, _ = step.update({"network": jnp.ones(1), "score": jnp.ones(1)}, state, params)
        >>> float(moved["network"][0]), round(float(moved["score"][0]), 6)
        (0.0, -0.001)
    """
    if not every:
        return optimizer
    if optimizer.gradient_point is not at_params:
        raise UserError(
            "this objective updates its networks in turns, and a schedule-free optimizer has one "
            "point of the gradient for all: take optimizer=adamw"
        )
    transform = optimizer.transform

    def init(params: Any) -> Turns:
        seldom, other = _split(params, always)
        return Turns(jnp.zeros((), jnp.int32), transform.init(seldom), transform.init(other))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        (ours, others), (seldom, other) = _split(updates, always), _split(params, always)
        slow, next_state = transform.update(ours, state.seldom, seldom)
        fast, always_state = transform.update(others, state.always, other)
        fast = jax.tree.map(lambda x: rate * x, fast)
        due = state.count % every == 0
        slow = jax.tree.map(lambda x: jnp.where(due, x, jnp.zeros_like(x)), slow)
        kept = jax.tree.map(lambda a, b: jnp.where(due, a, b), next_state, state.seldom)
        return {**slow, **fast}, Turns(state.count + 1, kept, always_state)  # pyright: ignore[reportGeneralTypeIssues]

    return optimizer._replace(transform=optax.GradientTransformation(init, update))


def _split(
    tree: Mapping[str, Any], names: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parts of a tree without and with these names."""
    without = {name: part for name, part in tree.items() if name not in names}
    return without, {name: part for name, part in tree.items() if name in names}
