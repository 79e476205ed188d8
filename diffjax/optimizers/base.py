"""The type of optimizers: an Optax transformation, its rate, and where the gradient is taken."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Point = Callable[[Any, Any], Any]
"""`(opt_state, params) -> params`."""


def at_params(opt_state: Any, params: Any) -> Any:
    """The parameters themselves: the point where almost every optimizer takes the gradient."""
    del opt_state
    return params


class Optimizer(NamedTuple):
    """An update rule: a transformation of gradients, with its learning rate.

    Parameters are always those to sample from: averages are of them, and `live` names them. An
    optimizer that takes gradients elsewhere (schedule-free) computes that point from its state.

    Attributes:
        transform: from a gradient to an update, which is added to the parameters.
        schedule: the learning rate by step; the first step is number 0.
        gradient_point: where the next gradient is taken.
        steps_of_rate: whether a parameter moves by about the rate in a step, however large its
            gradient is, as Adam moves it; the factors of muP suppose that.
    """

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    gradient_point: Point = at_params
    steps_of_rate: bool = False


def clip_by_norm(most: float) -> optax.GradientTransformation:
    """`g·min(1, most/|g|)`, with the norm over all parameters (Pascanu et al. 2013).

    What `optax.clip_by_global_norm` does, as one factor: XLA then multiplies by it where the
    gradient is read, and does not write the clipped gradient to memory first.

    Args:
        most: the largest norm.

    Example:
        >>> clip = clip_by_norm(1.0)
        >>> clipped, _ = clip.update(jnp.array([3.0, 4.0]), clip.init(None))
        >>> bool(jnp.allclose(clipped, jnp.array([0.6, 0.8])))
        True
    """

    def update(gradient: Any, params: Any) -> Any:
        del params
        factor = jnp.minimum(1.0, most / optax.tree.norm(gradient))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradient)

    return optax.stateless(update)
