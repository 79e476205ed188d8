"""Grids: the times of the steps from noise to data."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import register_dataclass
from jaxtyping import Float
from scipy.special import betaincinv

from diffjax.errors import UserError
from diffjax.kinds import NotNegative, Positive
from diffjax.process.paths import Path, Scalar, log_snr, time_of_log_snr
from diffjax.process.shifts import shifted

Grid = Callable[[Path, int], Array]
"""`(path, n) -> t[n+1]`, falling from `t_noise` to exactly 0; all but the last at least `t_min`.
`Leading` alone begins below `t_noise`."""


@register_dataclass
@dataclass(frozen=True)
class Power:
    """`t_i = t_noise·(1 - i/n)^exponent`: 1 is uniform in time, 2 quadratic.

    Song et al. 2021 (arXiv:2010.02502), appendix D.2, has both.

    Attributes:
        exponent: larger values have more steps near the data; typically 1 to 3.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> Power()(Linear(), 4).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    exponent: Positive[Scalar] = 1.0

    def __call__(self, path: Path, n: int) -> Float[Array, " {n}+1"]:
        u = (1.0 - jnp.arange(n) / n) ** self.exponent
        return _end_clean(path, path.t_noise * u)


@register_dataclass
@dataclass(frozen=True)
class UniformRoot:
    """Equal steps in a root of `t - t_min`: `t_i = t_min + (t_noise - t_min)·(1 - i/n)^exponent`.

    The last step begins well above `t_min`. In `Karras` it begins at `t_min`, where a consistency
    model has no noise left to remove. With n = 2 on EDM's path σ is 80 and
    0.63; two steps were published with 80 and 0.66 to 0.82 (Song et al. 2023, arXiv:2303.01469).

    Attributes:
        exponent: larger values have more steps near the data; 7 as `Karras`.

    Example:
        >>> from diffjax.process.schedules import EDM
        >>> [round(t, 3) for t in UniformRoot()(EDM(), 2).tolist()]
        [80.0, 0.627, 0.0]
    """

    exponent: Positive[Scalar] = 7.0

    def __call__(self, path: Path, n: int) -> Float[Array, " {n}+1"]:
        u = (1.0 - jnp.arange(n) / n) ** self.exponent
        return _end_clean(path, path.t_min + (path.t_noise - path.t_min) * u)


@register_dataclass
@dataclass(frozen=True)
class UniformLogSNR:
    """Equal steps in log-SNR from `t_noise` to `t_min`, then one to clean data.

    Where the path ends in pure noise (log-SNR of minus infinity), the first step goes to
    `lowest`. Lu et al. 2022 (arXiv:2206.00927), section 5.1.

    Attributes:
        lowest: the log-SNR at the end of the first step, if that is above the path's; -14 is a
            noise-to-signal ratio of 1,100.
    """

    lowest: Scalar = -14.0

    def __call__(self, path: Path, n: int) -> Float[Array, " {n}+1"]:
        first = jnp.maximum(log_snr(path, jnp.asarray(path.t_noise)), self.lowest)
        last = log_snr(path, jnp.asarray(path.t_min))
        inner = time_of_log_snr(path, jnp.linspace(first, last, n))
        return _end_clean(path, inner)


@register_dataclass
@dataclass(frozen=True)
class Karras:
    """Equal steps in `σ^(1/rho)`, where `σ = s/a` is the noise per unit of signal; then clean data.

    `σ_i = (σ_0^(1/ρ) + i/(n-1)·(σ_(n-1)^(1/ρ) - σ_0^(1/ρ)))^ρ` from `t_noise` to `t_min`. Where the
    path ends in pure noise (σ infinite), the grid continues from `highest`. Karras et al. 2022
    (arXiv:2206.00364), equation 5.

    Attributes:
        rho: larger values have more steps near the data; 7 in the paper, 5 to 10 are good.
        highest: the largest σ after the first time; 80 in the paper.

    Example:
        >>> from diffjax.process.schedules import EDM
        >>> [round(t, 3) for t in Karras()(EDM(), 4).tolist()]
        [80.0, 9.723, 0.47, 0.002, 0.0]
    """

    rho: Positive[Scalar] = 7.0
    highest: Positive[Scalar] = 80.0

    def __call__(self, path: Path, n: int) -> Float[Array, " {n}+1"]:
        ends = log_snr(path, jnp.stack([jnp.asarray(path.t_noise), jnp.asarray(path.t_min)]))
        first, last = jnp.minimum(jnp.exp(-0.5 * ends), self.highest) ** (1.0 / self.rho)
        sigma = jnp.linspace(first, last, n) ** self.rho
        inner = time_of_log_snr(path, -2.0 * jnp.log(sigma))
        return _end_clean(path, inner)


@register_dataclass
@dataclass(frozen=True)
class DownTo:
    """`n` evenly spaced times from `t_noise` down to the least one, and then 0.

    `t_i = t_noise·(1 - (1 - least)·i/(n-1))`: `Power` ends with the least time 1/n. Diffusers'
    flow-matching Euler has 0.001, shifted, as the least one.

    Attributes:
        least: the last time before 0, in units of `t_noise`.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> [round(t, 3) for t in DownTo(0.1)(Linear(), 4).tolist()]
        [1.0, 0.7, 0.4, 0.1, 0.0]
    """

    least: Positive[Scalar] = 0.001

    def __call__(self, path: Path, n: int) -> Float[Array, " {n}+1"]:
        return _end_clean(path, path.t_noise * jnp.linspace(1.0, self.least, n))


@register_dataclass
@dataclass(frozen=True)
class Shifted:
    """Another grid's times shifted towards noise: `u' = shift·u/(1 + (shift - 1)·u)`.

    Here `u = t/t_noise`. It is for large images, where the same noise hides less of the image. SD3
    and Flux use it with `shift = √(pixels/pixels in training)`. Esser et al. 2024
    (arXiv:2403.03206), equation 23.

    Attributes:
        grid: the other grid.
        shift: above 1 towards noise; 3 in SD3, 1 changes nothing.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> Shifted(shift=3.0)(Linear(), 2).tolist()
        [1.0, 0.75, 0.0]
    """

    grid: Grid = Power()
    shift: Positive[Scalar] = 3.0

    def __call__(self, path: Path, n: int) -> Float[Array, " {n}+1"]:
        u = self.grid(path, n)[:-1] / path.t_noise
        return _end_clean(path, path.t_noise * shifted(u, self.shift))


@dataclass(frozen=True)
class ShiftedBySteps:
    """Another grid shifted by `exp(μ)`, with μ linear in the number of steps: Flux.2's grid.

        μ(N, n) = m₁₀ + (m₂₀₀ − m₁₀)·(n − 10)/190,    m₁₀ = 8.738e-5·N + 1.898,
        m₂₀₀ = 1.693e-4·N + 0.457,    and m₂₀₀ for more than 4,300 tokens N

    as its authors fitted to good samples (github.com/black-forest-labs/flux2, `sampling.py`).

    Attributes:
        num_tokens: N of an image; 4,096 at 1024 pixels.
        grid: the other grid.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> [round(t, 3) for t in ShiftedBySteps(4096)(Linear(), 4).tolist()]
        [1.0, 0.967, 0.908, 0.767, 0.0]
    """

    num_tokens: Positive[int] = 4096
    grid: Grid = Power()

    def __call__(self, path: Path, n: int) -> Float[Array, " {n}+1"]:
        return Shifted(self.grid, math.exp(self.log_shift(n)))(path, n)

    def log_shift(self, n: int) -> float:
        """μ of n steps."""
        many = 0.00016927 * self.num_tokens + 0.45666666
        if self.num_tokens > 4300:
            return many
        few = 8.73809524e-05 * self.num_tokens + 1.89833333
        return few + (many - few) * (n - 10) / 190


@dataclass(frozen=True)
class Beta:
    """Quantiles of a beta distribution of time: more steps at both ends.

    Lee et al. 2024 (arXiv:2407.12173), section 4.

    Attributes:
        a: the first parameter, 0.6 in the paper; smaller values have more steps near the data.
        b: the second one, 0.6 in the paper; smaller values have more steps near the noise.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> [round(t, 3) for t in Beta()(Linear(), 4).tolist()]
        [1.0, 0.824, 0.5, 0.176, 0.0]
    """

    a: Positive[float] = 0.6
    b: Positive[float] = 0.6

    def __call__(self, path: Path, n: int) -> Float[Array, " {n}+1"]:
        u = betaincinv(self.a, self.b, 1.0 - np.arange(n) / n)
        return _end_clean(path, path.t_noise * jnp.asarray(u, jnp.float32))


@dataclass(frozen=True)
class Cosine:
    """`t_i = t_noise·(1 + cos(π·i/n))/2`: smaller steps at both ends.

    The extrema of a Chebyshev polynomial, scaled to the path's time.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> [round(t, 3) for t in Cosine()(Linear(), 4).tolist()]
        [1.0, 0.854, 0.5, 0.146, 0.0]
    """

    def __call__(self, path: Path, n: int) -> Float[Array, " {n}+1"]:
        angles = jnp.pi * jnp.arange(n, dtype=float) / n
        return _end_clean(path, path.t_noise * 0.5 * (1.0 + jnp.cos(angles)))


@dataclass(frozen=True)
class Trailing:
    """Every `T/n`-th of the steps of a table, from the last one on.

    `t_i = round(T·(1 - i/n))/T·t_noise`: "trailing" in diffusers. Lin et al. 2024
    (arXiv:2305.08891), table 2.

    Attributes:
        num_train_steps: T, the steps of the table; 1,000 for DDPM.

    Example:
        >>> from diffjax.process.beta_tables import LinearBetas
        >>> [round(t, 3) for t in Trailing()(LinearBetas(), 3).tolist()]
        [1.0, 0.667, 0.333, 0.0]
    """

    num_train_steps: Positive[int] = 1000

    def __call__(self, path: Path, n: int) -> Float[Array, " {n}+1"]:
        steps = np.round(self.num_train_steps * (1.0 - np.arange(n) / n))
        return _end_clean(path, path.t_noise * jnp.asarray(steps / self.num_train_steps))


@dataclass(frozen=True)
class Leading:
    """Every `⌊T/n⌋`-th of the steps of a table, from the first one on: begins below `t_noise`.

    `t_i = (1 + offset + (n - 1 - i)·⌊T/n⌋)/T·t_noise`: "leading" in diffusers. The walk begins at a
    step where the network expects some signal, with noise that has none; docs/solvers.md has what
    that costs. Lin et al. 2024 (arXiv:2305.08891), table 2.

    Attributes:
        num_train_steps: T, the steps of the table; 1,000 for DDPM.
        offset: `steps_offset` in diffusers, added to each step; 1 in Stable Diffusion.
        left_out: steps at the end that are counted in n and not taken; 1 in diffusers'
            DPM-Solver++ and UniPC.

    Example:
        >>> from diffjax.process.beta_tables import ScaledLinearBetas
        >>> [round(t, 3) for t in Leading()(ScaledLinearBetas(), 4).tolist()]
        [0.752, 0.502, 0.252, 0.002, 0.0]
    """

    num_train_steps: Positive[int] = 1000
    offset: NotNegative[int] = 1
    left_out: NotNegative[int] = 0

    def __call__(self, path: Path, n: int) -> Float[Array, " {n}+1"]:
        number = n + self.left_out
        steps = np.arange(number)[::-1][:n] * (self.num_train_steps // number) + self.offset
        times = path.t_noise * jnp.asarray((1.0 + steps) / self.num_train_steps, jnp.float32)
        return jnp.append(jnp.clip(times, path.t_min, path.t_noise), 0.0)


@dataclass(frozen=True)
class Subset:
    """`n` of the `N` times that a network of few steps was distilled on, from the last one on.

    `t_i = (N - ⌊i·N/n⌋)·⌊T/N⌋/T·t_noise`. Luo et al. 2023 (arXiv:2310.04378), in their public code.

    Attributes:
        num_train_steps: T, the steps of the table; 1,000 for Stable Diffusion.
        num_distilled: N, evenly spaced among them; 50 in LCM and TCD.

    Example:
        >>> from diffjax.process.beta_tables import ScaledLinearBetas
        >>> [round(t, 3) for t in Subset()(ScaledLinearBetas(), 4).tolist()]
        [1.0, 0.76, 0.5, 0.26, 0.0]
    """

    num_train_steps: Positive[int] = 1000
    num_distilled: Positive[int] = 50

    def __call__(self, path: Path, n: int) -> Float[Array, " {n}+1"]:
        if n > self.num_distilled:
            raise UserError(
                f"num_steps={n}: a walk takes some of the {self.num_distilled} times that the "
                "network was distilled on"
            )
        skipped = np.floor(np.linspace(0, self.num_distilled, n, endpoint=False))
        steps = (self.num_distilled - skipped) * (self.num_train_steps // self.num_distilled)
        return _end_clean(path, path.t_noise * jnp.asarray(steps / self.num_train_steps))


@dataclass(frozen=True)
class Linspace:
    """`n` evenly spaced steps of a table, from its last to its first.

    `t_i = (1 + round((T - 1)·(1 - i/(n-1))))/T·t_noise`: "linspace" in diffusers.

    Attributes:
        num_train_steps: T, the steps of the table; 1,000 for DDPM.
        left_out: steps at the end that are counted in n and not taken; 1 in diffusers'
            DPM-Solver++ and UniPC.
        whole: whether steps are rounded; not in diffusers' Euler.

    Example:
        >>> from diffjax.process.beta_tables import LinearBetas
        >>> [round(t, 4) for t in Linspace()(LinearBetas(), 3).tolist()]
        [1.0, 0.501, 0.001, 0.0]
    """

    num_train_steps: Positive[int] = 1000
    left_out: NotNegative[int] = 0
    whole: bool = True

    def __call__(self, path: Path, n: int) -> Float[Array, " {n}+1"]:
        steps = np.linspace(self.num_train_steps - 1, 0, n + self.left_out)[:n]
        steps = np.round(steps) if self.whole else steps
        return _end_clean(path, path.t_noise * (1.0 + jnp.asarray(steps)) / self.num_train_steps)


@dataclass(frozen=True)
class Sigmas:
    """A list of noise levels `σ = s/a`, interpolated for other numbers of steps.

    `log σ` is interpolated linearly in the position, as in the paper. The first step begins at
    `t_noise`, whatever its σ. Sabour et al. 2024 (Align Your Steps, arXiv:2404.14507).

    Attributes:
        sigmas: falling; the paper lists ten for each of its models.

    Example:
        >>> from diffjax.process.schedules import EDM
        >>> [round(t, 3) for t in Sigmas((80.0, 5.0, 0.5))(EDM(), 3).tolist()]
        [80.0, 5.0, 0.5, 0.0]
    """

    sigmas: tuple[Positive[float], ...]

    def __call__(self, path: Path, n: int) -> Float[Array, " {n}+1"]:
        given = np.linspace(0.0, 1.0, len(self.sigmas))
        logs = np.interp(np.linspace(0.0, 1.0, n), given, np.log(self.sigmas))
        inner = time_of_log_snr(path, jnp.asarray(-2.0 * logs, jnp.float32))
        return _end_clean(path, inner)


@dataclass(frozen=True)
class ListedTimes:
    """A given list of times, for one number of steps.

    Attributes:
        times: falling, the first `t_noise`, without the last one, which is 0.
    """

    times: tuple[Positive[float], ...]

    def __call__(self, path: Path, n: int) -> Float[Array, " {n}+1"]:
        if n != len(self.times) or self.times[0] != path.t_noise:
            raise UserError(
                f"this grid lists {len(self.times)} times from {self.times[:1]} on; {n} steps on "
                f"this path need {n}, the first at t_noise={path.t_noise}"
            )
        return _end_clean(path, jnp.asarray(self.times, jnp.float32))


def _end_clean(path: Path, times: Array) -> Array:
    return _with_ends(times, path.t_min, path.t_noise)


@jax.jit
def _with_ends(times: Array, t_min: Scalar, t_noise: Scalar) -> Array:
    return jnp.append(jnp.maximum(times, t_min).at[0].set(t_noise), 0.0)
