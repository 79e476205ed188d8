"""From one set of images to another: interpolants with a bridge noise, bridges from a source."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass
from jaxtyping import Float

from diffjax.errors import UserError
from diffjax.objectives.base import Batch, Traits
from diffjax.objectives.denoising import Denoising, Noised
from diffjax.process.bridges import BridgeNoise
from diffjax.process.paths import Coeffs, Pair, mix
from diffjax.process.precond import Precond
from diffjax.process.targets import Mix, decode
from diffjax.shapes import OneKey, OneNumber, PerSample, Samples


@register_dataclass
@dataclass(frozen=True)
class Interpolant(Denoising):
    """Stochastic interpolant `x_t = a·x0 + b·x1 + γ·z` between data and another end, `z ~ N(0, I)`.

    The coefficient `b` of the other end is the path's `s`. The other end is noise, or comes from
    the coupling, such as an image of another set. The network learns the velocity
    `E[a'·x0 + b'·x1 + γ'·z | x_t]`, so every solver of the probability-flow ODE maps one set to the
    other. With `γ = 0` and noise at the other end it is flow matching. Albergo et al. 2023
    (arXiv:2303.08797), definition 2.1.

    `z` is put into the pair: with `a·δ_0 + b·δ_1 = γ` and `a'·δ_0 + b'·δ_1 = γ'`, the pair
    `(x0, x1) + (δ_0, δ_1)·z` has the same `x_t` and the same velocity. So any target can be
    predicted, and the decoded prediction has the right velocity. It is the end itself only where
    `γ = γ' = 0`.

    Attributes:
        gamma: the bridge noise, a function of time that is 0 at both ends: `SineSquared`,
            `Brownian`, or `NoBridge` for none (`diffjax.process.bridges`).
    """

    gamma: BridgeNoise = field(kw_only=True)

    @property
    def traits(self) -> Traits:
        return replace(super().traits, independent_noise=False)

    def noised(self, t: PerSample, key: OneKey, batch: Batch) -> Noised:
        bridge_key, key = jax.random.split(key)
        noised = super().noised(t, key, batch)
        z = jax.random.normal(bridge_key, noised.x_t.shape)
        shift = bridge_shift(self.gamma, noised.c)
        pair = Pair(noised.pair.x0 + shift.x0 * z, noised.pair.eps + shift.eps * z)
        return noised._replace(pair=pair, x_t=mix(noised.c, pair))

    def noise_scale(self, t: OneNumber) -> OneNumber:
        # If the other end is noise, the variances of both parts add up.
        return jnp.hypot(self.path.sigma(t), self.gamma(t))

    def start(self, noise: Samples, source: Samples | None) -> Samples:
        t = jnp.asarray(self.path.t_noise)
        if source is None:
            return self.noise_scale(t) * noise
        return self.path.sigma(t) * source + self.gamma(t) * noise


def bridge_shift(gamma: BridgeNoise, c: Coeffs) -> Pair:
    """The pair `(δ_0, δ_1)` with mix `γ` and velocity `γ'`, of the shape of the coefficients.

    Example:
        >>> from diffjax.process.bridges import Brownian
        >>> from diffjax.process.paths import Linear, coeffs
        >>> shift = bridge_shift(Brownian(), coeffs(Linear(), jnp.array([0.5]), ndim=1))
        >>> float(shift.x0[0]), float(shift.eps[0])
        (0.5, 0.5)
    """
    value, slope = jax.jvp(gamma, (c.t,), (jnp.ones_like(c.t),))
    return decode(c, Mix(c.da, c.ds), slope, value)


@register_dataclass
@dataclass(frozen=True)
class SourceBridge(Denoising):
    """A bridge from a source image, a network input: `x_t = a·x0 + (1 - a)·x1 + s·eps`.

    For a given source, `y_t = x_t - (1 - a)·x1` follows an ordinary path: times, target, weight,
    decoding and solvers are those of `Denoising` for `y`. The inputs of the network are `x_t` and
    the source, one after the other in the channels. On the path `BrownianBridge`, `x_t` starts at
    the source and DDPM's steps are those of a Brownian (Föllmer) bridge. Samples follow the
    distribution of images given the source. Chen et al. 2024 (arXiv:2403.13724); Li et al. 2023
    (arXiv:2205.07680).
    """

    @property
    def traits(self) -> Traits:
        return replace(super().traits, inputs=2, needs_source=True, starts_at_source=True)

    def noised(self, t: PerSample, key: OneKey, batch: Batch) -> Noised:
        if "source" not in batch:
            raise UserError(
                f"SourceBridge needs a source for each image, but the data set has only "
                f"{', '.join(name for name in batch if name != 'cond')}; take a data set of pairs"
            )
        return super().noised(t, key, batch)._replace(source=batch["source"])

    def precond_for(self, source: Samples | None) -> Precond:
        if source is None:
            raise UserError("this model goes from one image to another: pass source=images")
        parts = self.precond
        return _SeesSource(parts.target, parts.noise_label, parts.input_scale, source=source)

    def start(self, noise: Samples, source: Samples | None) -> Samples:
        del source  # It is subtracted from y, and the network has it as an input.
        return self.path.sigma(jnp.asarray(self.path.t_noise)) * noise


@register_dataclass
@dataclass(frozen=True)
class _SeesSource(Precond):
    """Network inputs `x_t` and the source, from the solver's `y_t = x_t - (1 - a)·source`."""

    source: Any = field(kw_only=True)

    def inputs(self, c: Coeffs, x_t: Samples) -> tuple[Float[Array, " batch *shown"], PerSample]:
        # Guidance evaluates copies of the batch, one after the other.
        copies = x_t.shape[0] // self.source.shape[0]
        source = jnp.concatenate([self.source] * copies)
        x, noise_label = super().inputs(c, x_t + (1.0 - c.a) * source)
        return jnp.concatenate([x, source], axis=-1), noise_label
