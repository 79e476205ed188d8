"""What stands between path and network: the target, and how the network is told the time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.process.paths import Coeffs, Pair, Path, Scalar, coeffs
from diffjax.process.targets import Target, decode


class Apply(Protocol):
    """A network behind a closure; its output has the shape of `x`."""

    def __call__(
        self,
        params: object,
        x: Array,
        noise_label: Array,
        cond: Array | None,
        *,
        train: bool = False,
        key: Array | None = None,
    ) -> Array: ...


Predict = Callable[[Array, Array, Array | None], Pair]
"""`(x[B, …], t[B], cond[B] or None) -> Pair`: what every sampler sees of a trained model."""


@register_dataclass
@dataclass(frozen=True)
class TimeLabel:
    """`scale·t`: the noise label that DDPM, DiT and SiT give their networks (scale 1,000)."""

    scale: Scalar = 1000.0

    def __call__(self, c: Coeffs) -> Array:
        return self.scale * c.t


@register_dataclass
@dataclass(frozen=True)
class Precond:
    """What the network predicts and the label by which it knows the noise level.

    Attributes:
        target: `Coeffs -> Mix`.
        noise_label: `Coeffs ->` the network's second input.
    """

    target: Target
    noise_label: Callable[[Coeffs], Array]


def denoiser(apply: Apply, params: object, path: Path, precond: Precond) -> Predict:
    """A network as what every sampler needs: `(x, t, cond) -> (x0, eps)`.

    Args:
        apply: the network.
        params: its parameters, live or averaged.
        path: the path it was trained on.
        precond: the target it was trained for.
    """

    def predict(x: Array, t: Array, cond: Array | None) -> Pair:
        c = coeffs(path, t, x.ndim)
        output = apply(params, x, jnp.ravel(precond.noise_label(c)), cond)
        return decode(c, precond.target(c), output, x)

    return predict
