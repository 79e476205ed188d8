"""Forced weight normalisation: after each step every filter has its length back."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffjax.kinds import Decay, Positive
from diffjax.optimizers.adam import Adam
from diffjax.optimizers.base import Optimizer
from diffjax.optimizers.muon import is_axes, matrices

EPSILON = 1e-4
"""Added to a magnitude before it divides, as in `diffjax.models.layers.magnitude`."""


@dataclass(frozen=True)
class NormalisedAdam:
    """Adam with forced weight normalisation (Karras et al. 2024, arXiv:2312.02696, equation 66).

        w ← w − rate·m̂/(√v̂ + eps)          as `Adam`
        w ← w/(|w|/√n + 1e-4)               each vector w of the n inputs of an output of a kernel

    It is made for networks that normalise the same weights when they are used, such as `EDM2`: they
    do not depend on the length of w, so their gradient is orthogonal to w, and steps without
    normalisation lengthen w, which lowers the effective rate in an uncontrolled way. With it the
    relative size of a step is the rate. The loss does not change by the normalisation.

    Every array that is named `kernel` and has two axes or more is normalised; all others (gains)
    are Adam's alone. Networks that do not normalise their weights by themselves, as `DiT`, are
    changed by it and should not be trained with it.

    EDM2 takes peak rates of 0.012 (XS), 0.01 (S), 0.009 (M), 0.008 (L), 0.007 (XL) and 0.0065 (XXL)
    with batches of 2,048, a warm-up of 10 M images, no clipping, and `InverseSqrt`, constant for
    70,000 steps (ImageNet-512) or 35,000 (ImageNet-64) and falling then.

    Args:
        b1: decay of the first moment, from 0 to below 1.
        b2: decay of the second moment, from 0 to below 1.
        eps: added to the root of the second moment, above 0.
    """

    b1: Decay[float] = 0.9
    b2: Decay[float] = 0.99
    eps: Positive[float] = 1e-8

    def __call__(self, rate: optax.Schedule) -> Optimizer:
        rule = Adam(self.b1, self.b2, self.eps)(rate)
        return Optimizer(optax.chain(rule.transform, force_norm()), rate)


def force_norm() -> optax.GradientTransformation:
    """Changes updates so that `params + update` is `with_unit_filters(params + update)`.

    Example:
        >>> rule, params = force_norm(), {"kernel": jnp.array([[3.0], [4.0]])}
        >>> update, _ = rule.update({"kernel": jnp.zeros((2, 1))}, rule.init(params), params)
        >>> [round(w.item(), 2) for w in params["kernel"] + update["kernel"]]
        [0.85, 1.13]
    """

    def change(updates: Any, params: Any) -> Any:
        moved = with_unit_filters(optax.apply_updates(params, updates))
        return jax.tree.map(lambda new, old: new - old, moved, params)

    return optax.stateless(change)


def with_unit_filters(params: Any) -> Any:
    """Kernels with each output's vector of inputs divided by its magnitude (root mean square).

    Args:
        params: a tree of arrays; those that are named `kernel` and have two axes or more are
            normalised, each stacked block by itself.

    Example:
        >>> params = {"kernel": jnp.array([[3.0], [4.0]]), "gain": jnp.array(2.0)}
        >>> with_unit_filters(params)["gain"].item()
        2.0
    """

    def normalised(axes: Any, leaf: jax.Array) -> jax.Array:
        if axes is None:
            return leaf
        square = jnp.mean(jnp.square(leaf), axes.reduction_axis, keepdims=True)
        return leaf / (jnp.sqrt(square) + EPSILON)

    return jax.tree.map(normalised, matrices(params, ()), params, is_leaf=is_axes)
