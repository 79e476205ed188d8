"""Guidance turns a predictor into another one.

A rule joins two predictions for the same `x`, with the label and without it (or of any stronger and
weaker model), into one. Rules nest: some of them only change what another rule says.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from diffjax.process.paths import Coeffs, Pair, Path, Scalar, coeffs, log_snr_of
from diffjax.process.precond import Predict
from diffjax.process.targets import Mix, decode

Rule = Callable[[Array, Coeffs, Pair, Pair, Scalar], Pair]
"""`(x[B, …], coefficients, on, off, scale) -> Pair`; `on` is with the label, `off` without it."""


@dataclass(frozen=True)
class ClassifierFree:
    """`off + scale·(on - off)`: 1 is plain conditional prediction, 0 unconditional.

    Ho & Salimans 2022 (arXiv:2207.12598), with `scale = 1 + w`.
    """

    def __call__(self, x: Array, c: Coeffs, on: Pair, off: Pair, scale: Scalar) -> Pair:
        return Pair(*(weak + scale * (strong - weak) for strong, weak in zip(on, off, strict=True)))


@dataclass(frozen=True)
class ZeroStar:
    """CFG-Zero*: `p·off + scale·(on - p·off)` with `p = <on, off>/|off|²`, each a velocity.

    `p`, for each image, makes up for a network that is not trained to the end. The paper's other
    half, no movement in the first steps, is left out. Fan et al. 2025 (arXiv:2503.18886),
    algorithm 1.
    """

    def __call__(self, x: Array, c: Coeffs, on: Pair, off: Pair, scale: Scalar) -> Pair:
        strong, weak = (c.da * pair.x0 + c.ds * pair.eps for pair in (on, off))
        p = _dot(strong, weak) / jnp.maximum(_dot(weak, weak), 1e-12)
        velocity = p * weak + scale * (strong - p * weak)
        return decode(c, Mix(c.da, c.ds), velocity, x)


@dataclass(frozen=True)
class Projected:
    """APG: of the difference `on - off` in x0, the part along `on` counts only `parallel` times.

    `x0 = on + (scale - 1)·(orthogonal + parallel·along)`, and the difference is no longer than
    `longest` (root mean square over an image's numbers). Large scales then saturate less. The
    paper's momentum over steps is left out. Sadat et al. 2025 (arXiv:2410.02416), algorithm 1.
    """

    parallel: float = 0.0
    longest: float = jnp.inf

    def __call__(self, x: Array, c: Coeffs, on: Pair, off: Pair, scale: Scalar) -> Pair:
        change = on.x0 - off.x0
        size = jnp.sqrt(jnp.mean(change**2, axis=_axes(x), keepdims=True))
        change = change * jnp.minimum(1.0, self.longest / jnp.maximum(size, 1e-12))
        along = _dot(change, on.x0) / jnp.maximum(_dot(on.x0, on.x0), 1e-12) * on.x0
        return _with_x0(x, c, on.x0 + (scale - 1.0) * (change - (1.0 - self.parallel) * along))


@dataclass(frozen=True)
class Limited:
    """Another rule where log-SNR is between `low` and `high`, and `on` elsewhere.

    The defaults are the paper's interval of noise levels for ImageNet, `σ` from 0.28 to 2.9. Both
    predictions are still made at every step. Kynkäänniemi et al. 2024 (arXiv:2404.07724).
    """

    rule: Rule = ClassifierFree()
    low: float = -2.13
    high: float = 2.55

    def __call__(self, x: Array, c: Coeffs, on: Pair, off: Pair, scale: Scalar) -> Pair:
        level = log_snr_of(c)
        inside = (level >= self.low) & (level <= self.high)
        guided = self.rule(x, c, on, off, scale)
        return Pair(*(jnp.where(inside, new, old) for new, old in zip(guided, on, strict=True)))


@dataclass(frozen=True)
class Rescaled:
    """Another rule's x0, brought back to the standard deviation of `on`.

    `x0·(share·std(on)/std(x0) + 1 - share)`, deviations over one image each. Lin et al. 2024
    (arXiv:2305.08891), equations 15 and 16, on x0.
    """

    rule: Rule = ClassifierFree()
    share: float = 0.7

    def __call__(self, x: Array, c: Coeffs, on: Pair, off: Pair, scale: Scalar) -> Pair:
        x0 = self.rule(x, c, on, off, scale).x0
        there, here = (jnp.std(image, axis=_axes(x), keepdims=True) for image in (on.x0, x0))
        ratio = there / jnp.maximum(here, 1e-12)
        return _with_x0(x, c, x0 * (self.share * ratio + 1.0 - self.share))


@dataclass(frozen=True)
class Clipped:
    """Another rule's x0, cut off at -1 and 1: static thresholding. Ho et al. 2020."""

    rule: Rule = ClassifierFree()

    def __call__(self, x: Array, c: Coeffs, on: Pair, off: Pair, scale: Scalar) -> Pair:
        return _with_x0(x, c, jnp.clip(self.rule(x, c, on, off, scale).x0, -1.0, 1.0))


@dataclass(frozen=True)
class Thresholded:
    """Another rule's x0, cut off at its own quantile and divided by it, where that is above 1.

    Dynamic thresholding, for images in [-1, 1]. Saharia et al. 2022 (arXiv:2205.11487),
    section 2.3.
    """

    rule: Rule = ClassifierFree()
    quantile: float = 0.995

    def __call__(self, x: Array, c: Coeffs, on: Pair, off: Pair, scale: Scalar) -> Pair:
        x0 = self.rule(x, c, on, off, scale).x0
        edge = jnp.quantile(jnp.abs(x0), self.quantile, axis=_axes(x), keepdims=True)
        edge = jnp.maximum(edge, 1.0)
        return _with_x0(x, c, jnp.clip(x0, -edge, edge) / edge)


def guide(
    predict: Predict, path: Path, rule: Rule, scale: Scalar | None, null_label: int
) -> Predict:
    """A predictor with a rule around it.

    Both predictions go through the network as one batch of `2B`; that counts as two evaluations.
    Without a scale there is one, which the rule sees as both.

    Args:
        predict: a conditional predictor that also knows the null label.
        path: the one that it was trained on.
        rule: what to make of both predictions.
        scale: how far to go; None is off.
        null_label: the label that means "none".
    """

    def guided(x: Array, t: Array, cond: Array | None) -> Pair:
        c = coeffs(path, t, x.ndim)
        if scale is None:
            on = predict(x, t, cond)
            return rule(x, c, on, on, 1.0)
        assert cond is not None
        both = predict(
            jnp.concatenate([x, x]),
            jnp.concatenate([t, t]),
            jnp.concatenate([cond, jnp.full_like(cond, null_label)]),
        )
        on, off = (Pair(*half) for half in zip(*(jnp.split(p, 2) for p in both), strict=True))
        return rule(x, c, on, off, scale)

    return guided


def _axes(x: Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _dot(x: Array, y: Array) -> Array:
    return jnp.sum(x * y, axis=_axes(x), keepdims=True)


def _with_x0(x: Array, c: Coeffs, x0: Array) -> Pair:
    """The pair of this x0 that mixes to x."""
    return Pair(x0, (x - c.a * x0) / c.s)
