"""Derivatives of a network along a direction: exact, or by differences."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.kinds import Positive
from diffjax.process.paths import Scalar


class Derivative(Protocol):
    """How the derivative of a network along a direction is computed.

    Attributes:
        forward_mode: whether the network is differentiated in forward mode, which fused kernels of
            attention can't be.
    """

    @property
    def forward_mode(self) -> bool: ...

    def __call__(
        self, function: Callable[..., Array], primals: tuple[Any, ...], tangents: tuple[Any, ...]
    ) -> tuple[Array, Array]:
        """The function's value, and its derivative along the tangents, as `jax.jvp`."""
        ...


@register_dataclass
@dataclass(frozen=True)
class Exact:
    """The derivative in forward mode, `jax.jvp`.

    Example:
        >>> import jax.numpy as jnp
        >>> square = lambda x: x * x
        >>> value, change = Exact()(square, (jnp.array(3.0),), (jnp.array(1.0),))
        >>> float(value), float(change)
        (9.0, 6.0)
    """

    forward_mode = True

    def __call__(
        self, function: Callable[..., Array], primals: tuple[Any, ...], tangents: tuple[Any, ...]
    ) -> tuple[Array, Array]:
        return jax.jvp(function, primals, tangents)


@register_dataclass
@dataclass(frozen=True)
class CentralDifference:
    """Half the difference of two evaluations on both sides: `(f(p + h·v) - f(p - h·v))/(2h)`.

    It needs no forward mode, so any kernel of attention will do, and costs two evaluations. The
    bias is of second order in h; rounding adds the network's own error divided by h. So a step of
    1e-3 to 1e-2 is good in float32 (an error of 0.02 to 0.3 % on digits), and none in bfloat16
    (10 % at best; docs/objectives.md). Networks are evaluated up to h beyond the first and the last
    time, so the noise label has to be a time, not a log-SNR.

    Attributes:
        step: h, in units of time where the direction has time 1.

    Example:
        >>> import jax.numpy as jnp
        >>> cube = lambda x: x**3
        >>> value, change = CentralDifference(0.1)(cube, (jnp.array(1.0),), (jnp.array(1.0),))
        >>> round(float(value), 4), round(float(change), 4)  # 3 + h²
        (1.0, 3.01)
    """

    forward_mode = False

    step: Positive[Scalar] = 0.005

    def __call__(
        self, function: Callable[..., Array], primals: tuple[Any, ...], tangents: tuple[Any, ...]
    ) -> tuple[Array, Array]:
        def moved(by: Scalar) -> Array:
            return function(*jax.tree.map(lambda p, v: p + by * v, primals, tangents))

        change = (moved(self.step) - moved(-self.step)) / (2.0 * self.step)
        return function(*primals), change


EXACT = Exact()
