"""Loss weights: the factor of the squared error at each noise level.

The loss of an example is `w(t)·mean_pixels (prediction - target)²`, with weight `w`. Papers state
their weights for different targets. An error `e` of the prediction is an error `(s/D)·e` of x0 and
an error `(a/D)·e` of the noise, with the determinant `D` of `diffjax.process.targets`. So each
published weight is written once, as a function of `SNR = a²/s²`, for the squared error of x0:

    w = w_x0(SNR)·(s/D)²

and the factor `x0_factor = (s/D)²` carries it to the target that the network predicts. For noise
prediction `(s/D)² = 1/SNR`. Log-SNR is `λ = log SNR`.
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
"""`(Coeffs, Mix) -> [B, 1, …]`: the factor of the squared error of the prediction."""


def snr_of(c: Coeffs) -> Array:
    """The signal-to-noise ratio `SNR = a²/s²`, of the shape of the coefficients."""
    return jnp.square(c.a / c.s)


def x0_factor(c: Coeffs, k: Mix) -> Array:
    """The squared error of x0 divided by the squared error of the prediction, `(s/D)²`.

    Args:
        c: the coefficients of a path at some times.
        k: the coefficients of the target that the network predicts.

    Returns:
        The shape of the coefficients. For noise it is `s²/a²`, for clean data 1.

    Example:
        >>> from diffjax.process.paths import Cosine, coeffs
        >>> from diffjax.process.targets import Noise
        >>> c = coeffs(Cosine(), jnp.array([0.25]), ndim=1)  # a = 0.92, s = 0.38
        >>> round(x0_factor(c, Noise()(c)).item(), 3)
        0.172
    """
    return jnp.square(c.s / determinant(c, k))


@register_dataclass
@dataclass(frozen=True)
class Constant:
    """Weight 1 on the target that the network predicts: the unweighted loss, `w = 1`."""

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return jnp.ones_like(c.t)


@register_dataclass
@dataclass(frozen=True)
class ConstantIn:
    """Weight 1 on another target than the predicted one: `w = (D_space/D)²`.

    The loss equals the unweighted squared error of the target `space`, whatever the network
    predicts.

    Attributes:
        space: the target with the unweighted loss. `Noise` is DDPM's choice, `Velocity` that of
            flow matching, `F` that of EDM.
    """

    space: Target

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return jnp.square(determinant(c, self.space(c)) / determinant(c, k))


@register_dataclass
@dataclass(frozen=True)
class Capped:
    """Another weight, with a largest one for the squared error of x0: `w_x0 ← min(w_x0, largest)`.

    Li & He 2025 (arXiv:2511.13720), who clip the division that makes a velocity of a predicted x0.

    Attributes:
        weight: the other weight.
        largest: JiT has 400 for `ConstantIn(Velocity)`, which is `w_x0 = 1/max(t, 0.05)²` on the
            linear path.
    """

    weight: Weight
    largest: Positive[Scalar] = 400.0

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return jnp.minimum(self.weight(c, k), self.largest * x0_factor(c, k))


@register_dataclass
@dataclass(frozen=True)
class SNR:
    """SNR weighting: `w_x0 = SNR`, which is weight 1 for the error of the noise.

    Salimans & Ho 2022 (arXiv:2202.00512), section 4.
    """

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return snr_of(c) * x0_factor(c, k)


@register_dataclass
@dataclass(frozen=True)
class SNRPlusOne:
    """SNR + 1 weighting: `w_x0 = SNR + 1`, which is weight 1 for v if `a² + s² = 1`.

    Salimans & Ho 2022 (arXiv:2202.00512), section 4.
    """

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return (snr_of(c) + 1.0) * x0_factor(c, k)


@register_dataclass
@dataclass(frozen=True)
class TruncatedSNR:
    """Truncated SNR weighting: `w_x0 = max(SNR, 1)`.

    Unlike `SNR` it does not vanish where the signal is gone. Salimans & Ho 2022
    (arXiv:2202.00512), section 4.
    """

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return jnp.maximum(snr_of(c), 1.0) * x0_factor(c, k)


@register_dataclass
@dataclass(frozen=True)
class MinSNR:
    """Min-SNR weighting: `w_x0 = min(SNR, γ)`.

    For noise prediction that is `w = min(SNR, γ)/SNR`, for v with `a² + s² = 1` it is
    `w = min(SNR, γ)/(SNR + 1)`. Hang et al. 2023 (arXiv:2303.09556).

    Attributes:
        gamma: `γ`, the largest weight on the squared error of x0. Lower values weight the clean
            end less. The paper's default is 5.

    Example:
        >>> from diffjax.process.paths import Cosine, coeffs
        >>> from diffjax.process.targets import Noise
        >>> c = coeffs(Cosine(), jnp.array([0.25, 0.5]), ndim=1)  # SNR 5.83 and 1
        >>> [round(w, 3) for w in MinSNR()(c, Noise()(c)).tolist()]
        [0.858, 1.0]
    """

    gamma: Positive[Scalar] = 5.0

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return jnp.minimum(snr_of(c), self.gamma) * x0_factor(c, k)


@register_dataclass
@dataclass(frozen=True)
class SoftMinSNR:
    """Soft min-SNR weighting: `w_x0 = SNR·γ/(SNR + γ)`, a smooth form of `MinSNR`.

    Crowson et al. 2024 (arXiv:2401.11605), section 4.4.

    Attributes:
        gamma: `γ`, the weight that `w_x0` tends to as the noise vanishes. The paper has 4.
    """

    gamma: Positive[Scalar] = 4.0

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        snr = snr_of(c)
        return snr * self.gamma / (snr + self.gamma) * x0_factor(c, k)


@register_dataclass
@dataclass(frozen=True)
class P2:
    """P2 weighting: `w_x0 = SNR/(k + SNR)^γ`, which is `1/(k + SNR)^γ` for the noise.

    It weights low noise levels less, where only fine detail is learned. Choi et al. 2022
    (arXiv:2204.00227), equation 8.

    Attributes:
        gamma: `γ`, how strongly low noise levels are weighted down; 0 is the weight of `SNR`.
            Typical values are 0.5 and 1.
        shift: `k`, keeps the weight of the noise at most `k^-γ` at high noise. Typically 1.
    """

    gamma: NotNegative[Scalar] = 1.0
    shift: Positive[Scalar] = 1.0

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        snr = snr_of(c)
        return snr * (self.shift + snr) ** -self.gamma * x0_factor(c, k)


@register_dataclass
@dataclass(frozen=True)
class Debiased:
    """Debiased weighting: `w_x0 = √SNR`, which is `1/√SNR` for the noise.

    Yu et al. 2023 (arXiv:2310.08442).
    """

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return c.a / c.s * x0_factor(c, k)


@register_dataclass
@dataclass(frozen=True)
class EDM:
    """EDM weighting: `w_x0 = SNR + 1/sigma_data²`, which is weight 1 for EDM's target `F`.

    In EDM's notation `λ(σ) = (σ² + σ_data²)/(σ·σ_data)²`, where `λ` is not log-SNR. Karras et al.
    2022 (arXiv:2206.00364), table 1.

    Attributes:
        sigma_data: the standard deviation of the data. EDM has 0.5, for images in [-1, 1].
    """

    sigma_data: Positive[Scalar] = 0.5

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return (snr_of(c) + self.sigma_data**-2) * x0_factor(c, k)


@register_dataclass
@dataclass(frozen=True)
class ELBO:
    """The weight of the variational lower bound: `w_x0 = -½·dSNR/dt`, or `-½·dλ/dt` for the noise.

    With uniform times every interval of log-SNR has the same weight, and the expected loss is the
    bound's diffusion term in nats per pixel, divided by `t_noise - t_min`. With another density of
    times it is not a bound. To sample other times and keep the bound, wrap the objective in
    `Importance`. Kingma et al. 2021 (arXiv:2107.00630), equation 17.
    """

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return _snr_speed(c) * x0_factor(c, k)


@register_dataclass
@dataclass(frozen=True)
class Sigmoid:
    """Sigmoid weighting of log-SNR: `sigmoid(bias - λ)·(-½·dλ/dt)` for the noise.

    It is the ELBO's weight times a sigmoid, and assumes uniform times, as `ELBO` does: put other
    densities into `Importance`. Kingma & Gao 2023 (arXiv:2303.00848), section 4; Hoogeboom et al.
    2024 (arXiv:2410.19324).

    Attributes:
        bias: the log-SNR at which the sigmoid is ½; cleaner levels are weighted down. VDM++ has 2.
            Simpler diffusion (SiD2) lowers it for larger images; the choice `sigmoid_low` has -1.
    """

    bias: Scalar = 2.0

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return jax.nn.sigmoid(self.bias - log_snr_of(c)) * _snr_speed(c) * x0_factor(c, k)


def _snr_speed(c: Coeffs) -> Array:
    """`-½·dSNR/dt`, computed without a difference of logarithms."""
    return c.a / c.s**3 * (c.a * c.ds - c.s * c.da)
