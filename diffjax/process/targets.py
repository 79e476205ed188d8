"""What a network is trained to predict: two coefficients say it all.

Every target that anyone trains on is linear in the pair `(x0, eps)`:

    target = k_x·x0 + k_e·eps,        with D = k_x·s - k_e·a
    x0 = (s·pred - k_e·x_t) / D,      eps = (k_x·x_t - a·pred) / D

so one `decode` serves them all, and no sampler knows how the network was trained. `D → 0` marks
combinations that can't work; `undecodable` finds them before anything trains.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.compiling import once
from diffjax.errors import UserError
from diffjax.kinds import Positive
from diffjax.process.paths import Coeffs, Pair, Path, Scalar, coeffs
from diffjax.shapes import PerSample, Samples


class Mix(NamedTuple):
    """A target's coefficients: `target = k_x·x0 + k_e·eps`."""

    k_x: Array
    k_e: Array


Target = Callable[[Coeffs], Mix]


@register_dataclass
@dataclass(frozen=True)
class Noise:
    """`eps`, the noise (Ho et al. 2020, arXiv:2006.11239)."""

    def __call__(self, c: Coeffs) -> Mix:
        return Mix(jnp.zeros_like(c.t), jnp.ones_like(c.t))


@register_dataclass
@dataclass(frozen=True)
class Clean:
    """`x0`, the clean data."""

    def __call__(self, c: Coeffs) -> Mix:
        return Mix(jnp.ones_like(c.t), jnp.zeros_like(c.t))


@register_dataclass
@dataclass(frozen=True)
class V:
    """`v = a·eps - s·x0` (Salimans & Ho 2022, arXiv:2202.00512)."""

    def __call__(self, c: Coeffs) -> Mix:
        return Mix(-c.s, c.a)


@register_dataclass
@dataclass(frozen=True)
class Velocity:
    """`dx_t/dt = a'·x0 + s'·eps`, the velocity of flow matching on any path.

    On the linear path it is `eps - x0`. Lipman et al. 2023 (arXiv:2210.02747).
    """

    def __call__(self, c: Coeffs) -> Mix:
        return Mix(c.da, c.ds)


@register_dataclass
@dataclass(frozen=True)
class Score:
    """`∇ log p(x_t | x0) = -eps/s`, whose mean is the score (Song et al. 2021, arXiv:2011.13456).

    It grows as `1/s` towards clean data: with a constant weight that end decides the loss.
    """

    def __call__(self, c: Coeffs) -> Mix:
        return Mix(jnp.zeros_like(c.t), -1.0 / c.s)


@register_dataclass
@dataclass(frozen=True)
class F:
    """EDM's preconditioned target, of unit variance on every path.

    `F = (x0 - c_skip·x_t)/c_out = (s/σ·x0 - a·σ·eps)/√(s² + a²·σ²)` with `σ = sigma_data`. For
    `σ = 1` on a variance-preserving path it is `-v`. Karras et al. 2022 (arXiv:2206.00364),
    equation 7 and table 1, there with `a = 1`.

    Attributes:
        sigma_data: the data's standard deviation.
    """

    sigma_data: Positive[Scalar] = 0.5

    def __call__(self, c: Coeffs) -> Mix:
        norm = jnp.hypot(c.s, c.a * self.sigma_data)
        return Mix(c.s / (self.sigma_data * norm), -c.a * self.sigma_data / norm)


def chord(path: Path, t: PerSample, t_to: PerSample, ndim: int) -> Mix:
    """Coefficients of the average velocity from `t` to `t_to`: those of `Velocity`, averaged.

        k_x = (a(t) - a(t_to))/(t - t_to),      k_e = (s(t) - s(t_to))/(t - t_to)

    With these, `decode` turns an average velocity u into the pair that mixes to `x_t` at `t` and to
    `x_t + (t_to - t)·u` at `t_to`; so the step of DDIM follows the flow map. Geng et al. 2025
    (arXiv:2505.13447), equation 3.

    Args:
        path: any path.
        t: `[B]`.
        t_to: `[B]`; where it is `t`, the coefficients are those of `Velocity`.
        ndim: of the images, to broadcast against.
    """
    here, there = coeffs(path, t, ndim), coeffs(path, t_to, ndim)
    middle = coeffs(path, 0.5 * (t + t_to), ndim)
    span = here.t - there.t
    # Over so little the slope in the middle is the better one: it loses no digits.
    short = jnp.abs(span) < 0.01
    safe = jnp.where(short, 1.0, span)
    return Mix(
        jnp.where(short, middle.da, (here.a - there.a) / safe),
        jnp.where(short, middle.ds, (here.s - there.s) / safe),
    )


def encode(k: Mix, pair: Pair) -> Samples:
    """The regression target `k_x·x0 + k_e·eps`, `[B, …]`."""
    return k.k_x * pair.x0 + k.k_e * pair.eps


def decode(c: Coeffs, k: Mix, prediction: Samples, x_t: Samples) -> Pair:
    """Solves `prediction = k_x·x0 + k_e·eps` and `x_t = a·x0 + s·eps` for the pair.

    Args:
        c: the path at the times of `x_t`.
        k: the target's coefficients there.
        prediction: the network's output, `[B, …]`.
        x_t: the noisy images, `[B, …]`.
    """
    d = determinant(c, k)
    return Pair(
        x0=(c.s * prediction - k.k_e * x_t) / d,
        eps=(k.k_x * x_t - c.a * prediction) / d,
    )


def determinant(c: Coeffs, k: Mix) -> Array:
    """`D = k_x·s - k_e·a`; an error in the prediction is `s/D` times as large in x0."""
    return k.k_x * c.s - k.k_e * c.a


def undecodable(path: Path, target: Target, smallest: float = 5e-4) -> str | None:
    """Why a target can't be turned back into `(x0, eps)` somewhere on a path, or None.

    `|D| / (|k|·|(a, s)|)` is the sine of the angle between what is predicted and what is already
    known; where it is 0 the prediction adds nothing.

    Args:
        path: any path.
        target: any target.
        smallest: the sine that still counts; errors grow by its inverse. The default admits DDPM's
            last step (0.0064) and refuses exact zeros.

    Raises:
        UserError: no target can be used, for the numbers of the path do not go together.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> undecodable(Linear(), Velocity()) is None
        True
        >>> undecodable(Linear(), Noise())
        'at t=1 alpha=0 and sigma=1, so Noise says nothing that x_t does not'
    """
    c, sine = jax.device_get(_sine(path, target))
    _check_path(path, c)
    worst = int(np.argmin(np.where(np.isfinite(sine), sine, -1.0)))
    if sine[worst] >= smallest:
        return None
    # Without what rounding leaves of a zero.
    t, a, s = (round(float(values[worst]), 6) + 0.0 for values in (c.t, c.a, c.s))
    return (
        f"at t={t:.4g} alpha={a:.4g} and sigma={s:.4g}, "
        f"so {type(target).__name__} says nothing that x_t does not"
    )


@once()
def _sine(path: Path, target: Target) -> tuple[Coeffs, Array]:
    """Between what is predicted and what is known, at times along a path, and the path there."""

    @jax.jit  # also where path or target are no trees of numbers: half a second of every start
    def known() -> tuple[Coeffs, Array]:
        c = coeffs(path, jnp.linspace(path.t_min, path.t_noise, 1001), ndim=1)
        k = target(c)
        sine = jnp.abs(determinant(c, k)) / (jnp.hypot(k.k_x, k.k_e) * jnp.hypot(c.a, c.s))
        return c, sine

    return known()


def _check_path(path: Path, c: Coeffs) -> None:
    """Refuses what leads from no data to no noise: its numbers may be right one by one."""
    low, high = float(path.t_min), float(path.t_noise)
    a, s = c.a[::10], c.s[::10]
    rounding = 1e-6  # of the signal where it ends in 0
    positive = bool(((a >= -rounding) & (s >= 0)).all()) and a[0] > 0
    signal = a > rounding
    if not low < high or not positive or not (np.diff(s[signal] / a[signal]) > 0).all():
        raise UserError(
            f"{path} leads from no data to no noise: t_min must be below t_noise, and between them "
            "alpha and sigma at least 0, and sigma/alpha rising"
        )
