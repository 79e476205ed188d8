"""Paths made from other paths: shifted in log-SNR for high resolutions, or to zero terminal SNR."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.kinds import NotNegative, Positive
from diffjax.process.paths import Path, Scalar
from diffjax.shapes import AnyShape


def shifted(u: Any, shift: Scalar) -> Any:
    """SD3's time shift, `shift·u/(1 + (shift - 1)·u)`, of fractions of time `u` in [0, 1].

    Esser et al. 2024 (arXiv:2403.03206), equation 23.

    Args:
        u: a time divided by `t_noise`, of any shape; 0 and 1 stay as they are.
        shift: above 1 towards noise; 1 changes nothing.
    """
    return shift * u / (1.0 + (shift - 1.0) * u)


@register_dataclass
@dataclass(frozen=True)
class TimeShift:
    """SD3's resolution shift: the path at the shifted time `shift·u/(1 + (shift - 1)·u)`.

    Here `u = t/t_noise`. On the linear path it lowers log-SNR by `2·log(shift)` at each time. Esser
    et al. 2024 (arXiv:2403.03206), equation 23.

    Attributes:
        path: the path that is shifted; its two ends stay where they are.
        shift: `√(m/n)` for images of `m` pixels, if the unshifted path suits images of `n` pixels.
            Values above 1 add noise at each time. SD3 has 3 for 1024×1024 images.
    """

    path: Path
    shift: Positive[Scalar] = 3.0

    @property
    def t_min(self) -> Scalar:
        return self.path.t_noise * shifted(self.path.t_min / self.path.t_noise, 1.0 / self.shift)

    @property
    def t_noise(self) -> Scalar:
        return self.path.t_noise

    def alpha(self, t: AnyShape) -> AnyShape:
        return self.path.alpha(self._inner(t))

    def sigma(self, t: AnyShape) -> AnyShape:
        return self.path.sigma(self._inner(t))

    def _inner(self, t: Array) -> Array:
        inner = self.path.t_noise * shifted(t / self.path.t_noise, self.shift)
        # Rounding may go beyond the end, where `a` would be negative.
        return _with_slope(jnp.minimum(inner, self.path.t_noise), inner)


@register_dataclass
@dataclass(frozen=True)
class ScaledNoise:
    """A path with more noise and the same signal: `a`, `scale·s`, so `λ = λ_path - 2·log(scale)`.

    JiT's for images of 512 pixels. Li & He 2025 (arXiv:2511.13720).

    Attributes:
        path: the path whose noise is scaled.
        scale: the scale of the noise. JiT has 2 for 512×512 images, from 1 for 256×256.
    """

    path: Path
    scale: Positive[Scalar] = 2.0

    @property
    def t_min(self) -> Scalar:
        return self.path.t_min

    @property
    def t_noise(self) -> Scalar:
        return self.path.t_noise

    def alpha(self, t: AnyShape) -> AnyShape:
        return self.path.alpha(t)

    def sigma(self, t: AnyShape) -> AnyShape:
        return self.scale * self.path.sigma(t)


@register_dataclass
@dataclass(frozen=True)
class LogSNRShift:
    """Simple diffusion's resolution shift: `λ = λ_path + 2·log(scale)`, with `a² + s²` unchanged.

    Hoogeboom et al. 2023 (arXiv:2301.11093), section 2.1.

    Attributes:
        path: the path that is shifted.
        scale: the factor of the signal-to-noise ratio `a/s`. Values below 1 add noise at each
            time. The paper has 64 or 32, divided by the side of the images in pixels.
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
    """A path rescaled to zero terminal SNR: `a(t_noise) = 0`.

        a' = (a - a_end)/(1 - a_end),    s' = √(1 - a'²)

    A path that does not preserve variance is divided by `√(a² + s²)` before and multiplied by it
    afterwards. The noise can't be the target on such a path: predict v, the velocity or x0. Lin et
    al. 2023 (arXiv:2305.08891), algorithm 1, which keeps the value of `a` at the first step of the
    table; here the value at clean data, 1, is kept, unless `kept_at` is the time of that step:
    `a' = (a - a_end)·k/(k - a_end)` with `k = a(kept_at)`, at most 1.

    Attributes:
        path: the path that is rescaled.
        kept_at: the time at which `a` keeps its value; 0.001 is the first of 1,000 steps.
        floor: the smallest `a'`; 0, and 2⁻¹² in diffusers' solvers that use the log-SNR, where pure
            noise would be infinitely far away.
    """

    path: Path
    kept_at: NotNegative[Scalar] = 0.0
    floor: NotNegative[Scalar] = 0.0

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
        # 1 - k, without cancellation as well; 0 at clean data.
        _, k, s_k = self._unit(jnp.asarray(self.kept_at))
        gone = s_k**2 / (1.0 + k)
        kept = k * (a - end) / (k - end)
        # Rounding may leave a negative signal at the end.
        kept = _with_slope(jnp.clip(kept, self.floor, 1.0), kept)
        lost = (k * (s**2 / (1.0 + a)) - end * gone) / (k - end)
        return norm, kept, jnp.clip(lost, 0.0, 1.0 - self.floor)

    def _unit(self, t: Array) -> tuple[Array, Array, Array]:
        a, s = self.path.alpha(t), self.path.sigma(t)
        norm = jnp.sqrt(a**2 + s**2)
        return norm, a / norm, s / norm


def _with_slope(value: Array, x: Array) -> Array:
    """The value of `value` with the derivative of `x`: a clipped value keeps its slope."""
    return x + jax.lax.stop_gradient(value - x)
