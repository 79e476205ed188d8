"""Paths made of other paths: shifted for resolution, or with the last signal removed."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.kinds import Positive
from diffjax.process.paths import Path, Scalar
from diffjax.shapes import AnyShape


@register_dataclass
@dataclass(frozen=True)
class TimeShift:
    """SD3's resolution shift: the path at `shift·u/(1 + (shift - 1)·u)`, `u = t/t_noise`.

    On the linear path log-SNR falls by `2·log(shift)` at each time; `shift` is the root of the
    number of pixels over that of the training before. Esser et al. 2024 (arXiv:2403.03206),
    equation 23.

    Attributes:
        path: the path that is shifted; its ends stay where they are.
        shift: above 1 is towards noise.
    """

    path: Path
    shift: Positive[Scalar] = 3.0

    @property
    def t_min(self) -> Scalar:
        u = self.path.t_min / self.path.t_noise
        return self.path.t_noise * u / (self.shift - (self.shift - 1.0) * u)

    @property
    def t_noise(self) -> Scalar:
        return self.path.t_noise

    def alpha(self, t: AnyShape) -> AnyShape:
        return self.path.alpha(self._inner(t))

    def sigma(self, t: AnyShape) -> AnyShape:
        return self.path.sigma(self._inner(t))

    def _inner(self, t: Array) -> Array:
        u = t / self.path.t_noise
        inner = self.path.t_noise * self.shift * u / (1.0 + (self.shift - 1.0) * u)
        # Rounding may go past the end, where a would be negative.
        return _with_slope(jnp.minimum(inner, self.path.t_noise), inner)


@register_dataclass
@dataclass(frozen=True)
class LogSNRShift:
    """Simple diffusion's resolution shift: `λ = λ_path + 2·log(scale)`, `a² + s²` as before.

    `scale` is 64 over the image's side, or 32 over it. Hoogeboom et al. 2023 (arXiv:2301.11093),
    section 2.1.

    Attributes:
        path: the path that is shifted.
        scale: below 1 is towards noise.
    """

    path: Path
    scale: Positive[Scalar] = 0.5

    @property
    def t_min(self) -> Scalar:
        return self.path.t_min

    @property
    def t_noise(self) -> Scalar:
        return self.path.t_noise

    def alpha(self, t: AnyShape) -> AnyShape:
        return self.scale * self.path.alpha(t) * self._rescaled(t)

    def sigma(self, t: AnyShape) -> AnyShape:
        return self.path.sigma(t) * self._rescaled(t)

    def _rescaled(self, t: Array) -> Array:
        a, s = self.path.alpha(t), self.path.sigma(t)
        return jnp.sqrt((a**2 + s**2) / (self.scale**2 * a**2 + s**2))


@register_dataclass
@dataclass(frozen=True)
class ZeroTerminalSNR:
    """No signal left at `t_noise`: `a` of the variance-preserving form is moved to end in 0.

    `a' = (a - a_end)/(1 - a_end)`, `s' = √(1 - a'²)`. A path that does not preserve variance is
    divided by `√(a² + s²)` before and multiplied by it afterwards. Noise can't be a target there.
    Lin et al. 2023 (arXiv:2305.08891), algorithm 1, which keeps `a` of the table's first step where
    this keeps that of clean data.

    Attributes:
        path: the path that is rescaled.
    """

    path: Path

    @property
    def t_min(self) -> Scalar:
        return self.path.t_min

    @property
    def t_noise(self) -> Scalar:
        return self.path.t_noise

    def alpha(self, t: AnyShape) -> AnyShape:
        norm, kept, _ = self._parts(t)
        return norm * kept

    def sigma(self, t: AnyShape) -> AnyShape:
        norm, kept, lost = self._parts(t)
        return norm * jnp.sqrt(lost * (1.0 + kept))

    def _parts(self, t: Array) -> tuple[Array, Array, Array]:
        """The norm `√(a² + s²)`, `a'`, and `1 - a'` without cancellation near clean data."""
        _, end, _ = self._unit(jnp.asarray(self.path.t_noise))
        norm, a, s = self._unit(t)
        kept = (a - end) / (1.0 - end)
        # Rounding may leave a negative signal at the end.
        kept = _with_slope(jnp.maximum(kept, 0.0), kept)
        return norm, kept, s**2 / (1.0 + a) / (1.0 - end)

    def _unit(self, t: Array) -> tuple[Array, Array, Array]:
        a, s = self.path.alpha(t), self.path.sigma(t)
        norm = jnp.sqrt(a**2 + s**2)
        return norm, a / norm, s / norm


def _with_slope(value: Array, x: Array) -> Array:
    """`value` with the derivative of `x`: a bound on a value that does not stop its slope."""
    return x + jax.lax.stop_gradient(value - x)
