"""Prediction targets: what a network is trained to predict, as two coefficients.

All targets in use are linear in the pair `(x0, eps)`:

    target = k_x·x0 + k_e·eps,        with D = k_x·s - k_e·a
    x0 = (s·pred - k_e·x_t) / D,      eps = (k_x·x_t - a·pred) / D

So one function `decode` is enough for all of them, and samplers do not depend on how the network
was trained. Where `D` is 0, nothing can be decoded from the prediction; `undecodable` finds such
combinations of path and target before training starts.
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
    """The coefficients of a target: `target = k_x·x0 + k_e·eps`.

    Attributes:
        k_x: the coefficient of the clean data, `[B, 1, …]`.
        k_e: the coefficient of the noise, `[B, 1, …]`.
    """

    k_x: Array
    k_e: Array


Target = Callable[[Coeffs], Mix]
"""The coefficients of what is predicted, from those of the path."""


@register_dataclass
@dataclass(frozen=True)
class Noise:
    """The noise, `target = eps`. Ho et al. 2020 (arXiv:2006.11239)."""

    def __call__(self, c: Coeffs) -> Mix:
        return Mix(jnp.zeros_like(c.t), jnp.ones_like(c.t))


@register_dataclass
@dataclass(frozen=True)
class Clean:
    """The clean data, `target = x0`."""

    def __call__(self, c: Coeffs) -> Mix:
        return Mix(jnp.ones_like(c.t), jnp.zeros_like(c.t))


@register_dataclass
@dataclass(frozen=True)
class V:
    """The target `v = a·eps - s·x0`. Salimans & Ho 2022 (arXiv:2202.00512)."""

    def __call__(self, c: Coeffs) -> Mix:
        return Mix(-c.s, c.a)


@register_dataclass
@dataclass(frozen=True)
class Velocity:
    """The velocity of flow matching, `target = dx_t/dt = a'·x0 + s'·eps`, on any path.

    On the linear path it is `eps - x0`. Lipman et al. 2023 (arXiv:2210.02747).
    """

    def __call__(self, c: Coeffs) -> Mix:
        return Mix(c.da, c.ds)


@register_dataclass
@dataclass(frozen=True)
class VelocityToData:
    """The velocity of a time that runs from noise to data, `target = -dx_t/dt`, on any path.

    On the linear path it is `x0 - eps`, which the published SiT predicts. Ma et al. 2024
    (arXiv:2401.08740), whose time is `1 - t`.
    """

    def __call__(self, c: Coeffs) -> Mix:
        return Mix(-c.da, -c.ds)


@register_dataclass
@dataclass(frozen=True)
class Score:
    """The conditional score, `target = ∇ log p(x_t | x0) = -eps/s`.

    Its mean given `x_t` is the score `∇ log p(x_t)`. It grows as `1/s` towards clean data, so with
    a constant weight the clean end dominates the loss. Song et al. 2021 (arXiv:2011.13456).
    """

    def __call__(self, c: Coeffs) -> Mix:
        return Mix(jnp.zeros_like(c.t), -1.0 / c.s)


@register_dataclass
@dataclass(frozen=True)
class ScaledScore:
    """The conditional score times the deviation of the noise, `target = s·∇ log p = -eps`.

    The published NCSN++ of variance exploding paths predicts it. Song et al. 2021
    (arXiv:2011.13456), equation 7.
    """

    def __call__(self, c: Coeffs) -> Mix:
        return Mix(jnp.zeros_like(c.t), -jnp.ones_like(c.t))


@register_dataclass
@dataclass(frozen=True)
class F:
    """EDM's preconditioned target `F`, which has unit variance on every path.

        F = (x0 - c_skip·x_t)/c_out = (s/σ·x0 - a·σ·eps)/√(s² + a²·σ²),    σ = sigma_data

    For `σ = 1` on a variance-preserving path it is `-v`. Karras et al. 2022 (arXiv:2206.00364),
    equation 7 and table 1, there with `a = 1`.

    Attributes:
        sigma_data: the standard deviation of the data. EDM has 0.5, for images in [-1, 1].
    """

    sigma_data: Positive[Scalar] = 0.5

    def __call__(self, c: Coeffs) -> Mix:
        norm = jnp.hypot(c.s, c.a * self.sigma_data)
        return Mix(c.s / (self.sigma_data * norm), -c.a * self.sigma_data / norm)


def chord(path: Path, t: PerSample, t_to: PerSample, ndim: int) -> Mix:
    """The coefficients of the average velocity from `t` to `t_to`: time averages of `Velocity`'s.

        k_x = (a(t) - a(t_to))/(t - t_to),      k_e = (s(t) - s(t_to))/(t - t_to)

    With these, `decode` turns an average velocity `u` into the pair that mixes to `x_t` at `t` and
    to `x_t + (t_to - t)·u` at `t_to`. So a step of DDIM with this pair follows the flow map. Geng
    et al. 2025 (arXiv:2505.13447), equation 3.

    Args:
        path: any path.
        t: `[B]`.
        t_to: `[B]`; where it equals `t`, the coefficients are those of `Velocity`.
        ndim: the rank of the images, to broadcast against.

    Returns:
        Coefficients of shape `[B, 1, …, 1]`, of rank `ndim`.
    """
    here, there = coeffs(path, t, ndim), coeffs(path, t_to, ndim)
    middle = coeffs(path, 0.5 * (t + t_to), ndim)
    span = here.t - there.t
    # Over a short interval the derivative in the middle is more exact: it loses no digits.
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
        c: the coefficients of the path at the times of `x_t`.
        k: the coefficients of the target there.
        prediction: the network's output, `[B, …]`.
        x_t: the noisy images, `[B, …]`.
    """
    d = determinant(c, k)
    return Pair(
        x0=(c.s * prediction - k.k_e * x_t) / d,
        eps=(k.k_x * x_t - c.a * prediction) / d,
    )


def determinant(c: Coeffs, k: Mix) -> Array:
    """The determinant `D = k_x·s - k_e·a`: an error `e` of the prediction is `(s/D)·e` in x0."""
    return k.k_x * c.s - k.k_e * c.a


def undecodable(path: Path, target: Target, smallest: float = 5e-4) -> str | None:
    """Why `(x0, eps)` can't be decoded from a target everywhere on a path, or None if it can.

    `|D| / (|k|·|(a, s)|)` is the sine of the angle between the target and `x_t`, as vectors of
    coefficients. Where it is 0 the prediction is a multiple of `x_t`, and nothing can be decoded.

    Args:
        path: any path.
        target: any target.
        smallest: the smallest sine that is accepted; decoding multiplies errors by its inverse.
            The default accepts DDPM's last step (0.0064) and refuses exact zeros.

    Raises:
        UserError: the path itself is wrong: time, `alpha` or `sigma` do not lead from data to
            noise.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> undecodable(Linear(), Velocity()) is None
        True
        >>> undecodable(Linear(), Noise())
        'at t=1 alpha=0 and sigma=1, so x_t and Noise do not determine x0 and eps'
    """
    c, sine = jax.device_get(_sine(path, target))
    _check_path(path, c)
    worst = int(np.argmin(np.where(np.isfinite(sine), sine, -1.0)))
    if sine[worst] >= smallest:
        return None
    # Rounded, so that a zero does not print as 6e-17.
    t, a, s = (round(float(values[worst]), 6) + 0.0 for values in (c.t, c.a, c.s))
    return (
        f"at t={t:.4g} alpha={a:.4g} and sigma={s:.4g}, "
        f"so x_t and {type(target).__name__} do not determine x0 and eps"
    )


@once()
def _sine(path: Path, target: Target) -> tuple[Coeffs, Array]:
    """Between predicted and known values, at times along a path, and the path there."""

    @jax.jit  # also where path or target are no trees of numbers: half a second of every start
    def known() -> tuple[Coeffs, Array]:
        c = coeffs(path, jnp.linspace(path.t_min, path.t_noise, 1001), ndim=1)
        k = target(c)
        sine = jnp.abs(determinant(c, k)) / (jnp.hypot(k.k_x, k.k_e) * jnp.hypot(c.a, c.s))
        return c, sine

    return known()


def _check_path(path: Path, c: Coeffs) -> None:
    """Refuses paths that do not lead from data to noise, though each of their numbers is legal."""
    low, high = float(path.t_min), float(path.t_noise)
    a, s = c.a[::10], c.s[::10]
    rounding = 1e-6  # of the signal where it ends in 0
    positive = bool(((a >= -rounding) & (s >= 0)).all()) and a[0] > 0
    signal = a > rounding
    if not low < high or not positive or not (np.diff(s[signal] / a[signal]) > 0).all():
        raise UserError(
            f"{path} does not lead from data to noise: t_min must be below t_noise, and between "
            "them alpha and sigma must be at least 0 and sigma/alpha must increase"
        )
