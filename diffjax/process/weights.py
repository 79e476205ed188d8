"""How much an error counts at each noise level.

A weight multiplies the squared error in the target's own space. One factor carries it to another
space: an error `e` of the prediction is an error `(s/D)·e` of x0 and `(a/D)·e` of the noise. So
each published weight is stated once, as a function of `SNR = a²/s²` in the space of x0, and
`x0_factor` makes it right for every target.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.kinds import NotNegative, Positive
from diffjax.process.paths import Coeffs, Scalar, log_snr_of
from diffjax.process.targets import Mix, Target, determinant

Weight = Callable[[Coeffs, Mix], Array]
"""`(Coeffs, Mix) -> [B, 1, …]`: the weight of the squared error in the target's own space."""


def snr_of(c: Coeffs) -> Array:
    """`SNR = a²/s²`, of the shape of the coefficients."""
    return jnp.square(c.a / c.s)


def x0_factor(c: Coeffs, k: Mix) -> Array:
    """`(s/D)²`: squared error in x0 per squared error of the prediction."""
    return jnp.square(c.s / determinant(c, k))


@register_dataclass
@dataclass(frozen=True)
class Constant:
    """1 in the target's own space: the plain loss of each paper."""

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return jnp.ones_like(c.t)


@register_dataclass
@dataclass(frozen=True)
class ConstantIn:
    """1 in the space of another target: `(D_space/D)²`.

    Whatever the network predicts, the loss is the plain loss of `space`.

    Attributes:
        space: any target.
    """

    space: Target

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return jnp.square(determinant(c, self.space(c)) / determinant(c, k))


@register_dataclass
@dataclass(frozen=True)
class SNR:
    """`SNR` for x0, which is 1 for the noise. Salimans & Ho 2022 (arXiv:2202.00512), section 4."""

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return snr_of(c) * x0_factor(c, k)


@register_dataclass
@dataclass(frozen=True)
class SNRPlusOne:
    """`SNR + 1` for x0, which is 1 for v on a variance-preserving path.

    Salimans & Ho 2022 (arXiv:2202.00512), section 4.
    """

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return (snr_of(c) + 1.0) * x0_factor(c, k)


@register_dataclass
@dataclass(frozen=True)
class TruncatedSNR:
    """`max(SNR, 1)` for x0. Salimans & Ho 2022 (arXiv:2202.00512), section 4."""

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return jnp.maximum(snr_of(c), 1.0) * x0_factor(c, k)


@register_dataclass
@dataclass(frozen=True)
class MinSNR:
    """`min(SNR, γ)` in the space of x0, whatever the target.

    For noise prediction that is `min(SNR, γ)/SNR`, for v on a variance-preserving path
    `min(SNR, γ)/(SNR + 1)`. Hang et al. 2023 (arXiv:2303.09556).
    """

    gamma: Positive[Scalar] = 5.0

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return jnp.minimum(snr_of(c), self.gamma) * x0_factor(c, k)


@register_dataclass
@dataclass(frozen=True)
class SoftMinSNR:
    """`SNR·γ/(SNR + γ)` for x0: min-SNR without the corner.

    Crowson et al. 2024 (arXiv:2401.11605), section 4.4, with `γ = 4`.
    """

    gamma: Positive[Scalar] = 4.0

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        snr = snr_of(c)
        return snr * self.gamma / (snr + self.gamma) * x0_factor(c, k)


@register_dataclass
@dataclass(frozen=True)
class P2:
    """`SNR/(shift + SNR)^γ` for x0, `1/(shift + SNR)^γ` for the noise: less for fine detail.

    Choi et al. 2022 (arXiv:2204.00227), equation 8.
    """

    gamma: NotNegative[Scalar] = 1.0
    shift: Positive[Scalar] = 1.0

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        snr = snr_of(c)
        return snr * (self.shift + snr) ** -self.gamma * x0_factor(c, k)


@register_dataclass
@dataclass(frozen=True)
class Debiased:
    """`√SNR` for x0, `1/√SNR` for the noise. Yu et al. 2023 (arXiv:2310.08442)."""

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return c.a / c.s * x0_factor(c, k)


@register_dataclass
@dataclass(frozen=True)
class EDM:
    """`SNR + 1/sigma_data²` for x0, which is 1 for EDM's `F`.

    In EDM's own terms `(σ² + σ_data²)/(σ·σ_data)²`. Karras et al. 2022 (arXiv:2206.00364), table 1.

    Attributes:
        sigma_data: the data's standard deviation.
    """

    sigma_data: Positive[Scalar] = 0.5

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return (snr_of(c) + self.sigma_data**-2) * x0_factor(c, k)


@register_dataclass
@dataclass(frozen=True)
class ELBO:
    """`-½·dSNR/dt` for x0, `-½·dλ/dt` for the noise: the variational bound, at uniform times.

    Log-SNR then counts evenly. Other times draw from it more often elsewhere, and the sum is no
    bound any longer: to draw elsewhere and keep the bound, wrap the objective in `Importance`.
    Kingma et al. 2021 (arXiv:2107.00630), equation 17.
    """

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return _snr_speed(c) * x0_factor(c, k)


@register_dataclass
@dataclass(frozen=True)
class Sigmoid:
    """`sigmoid(bias - λ)·(-½·dλ/dt)` for the noise: sigmoid in log-SNR, at uniform times.

    VDM++ has `bias = 2`; simpler diffusion lowers it for larger images. As with `ELBO`, times other
    than uniform belong into `Importance`. Kingma & Gao 2023 (arXiv:2303.00848), section 4;
    Hoogeboom et al. 2024 (arXiv:2410.19324).
    """

    bias: Scalar = 2.0

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return jax.nn.sigmoid(self.bias - log_snr_of(c)) * _snr_speed(c) * x0_factor(c, k)


def _snr_speed(c: Coeffs) -> Array:
    """`-½·dSNR/dt`, without a difference of logarithms."""
    return c.a / c.s**3 * (c.a * c.ds - c.s * c.da)
