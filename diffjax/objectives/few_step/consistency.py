"""Consistency models: a network of the end of the flow, learned from pairs of noise levels."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.conditions.guided import split
from diffjax.kinds import AtLeastOne, NotNegative, Positive, Range
from diffjax.objectives.base import Batch, Progress, Traits
from diffjax.objectives.denoising import Noised, Noising, in_training
from diffjax.objectives.distances import MeanSquare, Metric
from diffjax.process.paths import Pair, Path, Scalar, coeffs, log_snr, mix, time_of_log_snr
from diffjax.process.precond import Apply, Meaning, Predict, denoiser
from diffjax.shapes import AnyShape, OneKey, OneNumber, PerSample, Samples


class Levels(Protocol):
    """How many noise levels the discretisation has, as training goes on."""

    def __call__(self, fraction: OneNumber) -> OneNumber:
        """The number of levels, `[]`, at least 2, when this fraction of training is done."""
        ...


@register_dataclass
@dataclass(frozen=True)
class Doubling:
    """Levels that double: `min(first·2^⌊fraction·(log2(last/first) + 1)⌋, last) + 1`.

    Song & Dhariwal 2023 (arXiv:2310.14189), equation 6.

    Attributes:
        first: intervals at the begin; 10 in the paper.
        last: intervals at the end; 1,280 in the paper, for 400,000 steps.

    Example:
        >>> [int(Doubling()(jnp.array(x))) for x in (0.0, 0.13, 0.99)]
        [11, 21, 1281]
    """

    first: AtLeastOne[Scalar] = 10.0
    last: AtLeastOne[Scalar] = 1280.0

    def __call__(self, fraction: OneNumber) -> OneNumber:
        stages = jnp.floor(jnp.log2(self.last / self.first)) + 1.0
        doubled = self.first * 2.0 ** jnp.floor(fraction * stages)
        return jnp.minimum(doubled, self.last) + 1.0


@register_dataclass
@dataclass(frozen=True)
class SquareRoot:
    """Levels whose square grows evenly: `⌈√(f·((last + 1)² - first²) + first²) - 1⌉ + 1`.

    Song et al. 2023 (arXiv:2303.01469), appendix C.

    Attributes:
        first: 2 in the paper.
        last: 150 in the paper.

    Example:
        >>> [int(SquareRoot()(jnp.array(x))) for x in (0.0, 0.5, 1.0)]
        [2, 107, 151]
    """

    first: AtLeastOne[Scalar] = 2.0
    last: AtLeastOne[Scalar] = 150.0

    def __call__(self, fraction: OneNumber) -> OneNumber:
        square = fraction * ((self.last + 1.0) ** 2 - self.first**2) + self.first**2
        return jnp.ceil(jnp.sqrt(square) - 1.0) + 1.0


Pairs = Callable[
    [PerSample, OneNumber, OneNumber, OneNumber],
    tuple[PerSample, PerSample],
]
"""`(σ[B], lowest[], highest[], fraction[]) -> (σ[B], earlier σ[B])`.

The levels that are compared, from levels `σ = s/a` of the density of times; an earlier level under
the lowest is clean data.
"""


@register_dataclass
@dataclass(frozen=True)
class Neighbours:
    """Two neighbours of the levels `(low^{1/ρ} + i/(N-1)·(high^{1/ρ} - low^{1/ρ}))^ρ`.

    They are the ends of the interval in which σ lies. So the density of times is the probability of
    an interval, and its place within makes no difference.

    Song et al. 2023 (arXiv:2303.01469), section 5; Karras et al. 2022 (arXiv:2206.00364), eq. 5.

    Attributes:
        levels: their number N, as training goes on.
        rho: how much closer levels are at low noise; 7 in the papers.
    """

    levels: Levels = SquareRoot()
    rho: Positive[Scalar] = 7.0

    def __call__(
        self, sigma: PerSample, lowest: OneNumber, highest: OneNumber, fraction: OneNumber
    ) -> tuple[PerSample, PerSample]:
        low, high = lowest ** (1.0 / self.rho), highest ** (1.0 / self.rho)
        intervals = self.levels(fraction) - 1.0
        place = intervals * (sigma ** (1.0 / self.rho) - low) / (high - low)
        before = jnp.clip(jnp.floor(place), 0.0, intervals - 1.0)

        def level(i: Array) -> Array:
            return (low + i / intervals * (high - low)) ** self.rho

        return level(before + 1.0), level(before)


@register_dataclass
@dataclass(frozen=True)
class Shrinking:
    """A level and a fraction of it that tends to one: `σ' = σ·(1 - n(σ)/q^{k+1})`, at least 0.

        n(σ) = 1 + slope·sigmoid(-decay·σ),      k = ⌊fraction·stages⌋

    At the begin σ' is 0 for most levels, and training is that of a denoiser: so it starts well from
    the weights of a diffusion model. ECT, Geng et al. 2024 (arXiv:2406.14548), section 3.2.

    Attributes:
        base: q; 2 in the authors' code for CIFAR-10, 4 for ImageNet-64.
        stages: how often the distance shrinks; 8 in the paper for CIFAR-10 with q = 2.
        slope: the slope of n; 8 in the paper.
        decay: the decay of n; 1 in the paper.
    """

    base: Annotated[Scalar, Range("(1, inf)")] = 2.0
    stages: Positive[int] = field(default=8, metadata={"static": True})
    slope: NotNegative[Scalar] = 8.0
    decay: NotNegative[Scalar] = 1.0

    def __call__(
        self, sigma: PerSample, lowest: OneNumber, highest: OneNumber, fraction: OneNumber
    ) -> tuple[PerSample, PerSample]:
        del lowest, highest
        stage = jnp.minimum(jnp.floor(fraction * self.stages), self.stages - 1.0)
        n = 1.0 + self.slope * jax.nn.sigmoid(-self.decay * sigma)
        return sigma, sigma * jnp.maximum(1.0 - n / self.base ** (stage + 1.0), 0.0)


@register_dataclass
@dataclass(frozen=True)
class FromData:
    """The data and the noise of which `x_t` is made: training without a teacher."""

    distils = False

    def __call__(self, teacher: Predict, noised: Noised, x_t: Samples, t: PerSample) -> Pair:
        del teacher, x_t, t
        return noised.pair


@register_dataclass
@dataclass(frozen=True)
class FromTeacher:
    """What a trained denoiser predicts, with classifier-free guidance: distillation.

        x0 + (scale - 1)·(x0 - x0(no condition)), and the noise that mixes with it to x_t

    The teacher is `config.teacher`, a run or a file with the same network, target and path. LCM,
    Luo et al. 2023 (arXiv:2310.04378), equation 14. With the wrapper `EmbeddedGuidance` the scale
    is that of each example, which the student has as an input and the teacher has not.

    Attributes:
        guidance_scale: 1 is no guidance; the distilled model then needs none. Without effect where
            each example has its own.
    """

    distils = True

    guidance_scale: Positive[float] = field(default=1.0, metadata={"static": True})

    def __call__(self, teacher: Predict, noised: Noised, x_t: Samples, t: PerSample) -> Pair:
        cond, scale = split(noised.cond)
        pair = teacher(x_t, t, cond)
        if scale is not None or self.guidance_scale != 1.0:
            other = teacher(x_t, t, None)
            more: Any = self.guidance_scale - 1.0
            if scale is not None:
                more = jnp.reshape(scale - 1.0, (-1,) + (1,) * (x_t.ndim - 1))
            pair = jax.tree.map(lambda on, off: on + more * (on - off), pair, other)
        return jax.lax.stop_gradient(pair)


DATA, TEACHER, SQUARE = FromData(), FromTeacher(), MeanSquare()


@register_dataclass
@dataclass(frozen=True)
class Consistency(Noising):
    """The end of the flow from `x_t`, learned as what does not change along the flow.

        loss = (σ - σ')^-power · d(f(x_t, t), sg f(x_t', t')),      f(x, 0) = x

    Two noise levels σ > σ' of one image with the same noise; f is the clean image that the
    network's output means (`decode`), which is x itself without noise for each target here but
    the noise. With a teacher, `x_t'` is a step of DDIM from `x_t` along its prediction.

    With pairs that approach one another, f tends to the end of the flow: the error of a pair is of
    the order of the square of its distance. Song et al. 2023 (arXiv:2303.01469), algorithms 2
    and 3; with other pairs, distances and powers iCT (arXiv:2310.14189) and ECT
    (arXiv:2406.14548).

    Attributes, beside those of `Noising`, whose weight multiplies the distance:
        pairs: which levels are compared.
        metric: the distance of two images, `MeanSquare`, `PseudoHuber` or `Perceptual`.
        power: the power of the difference of the levels; 0 in CT, 1 in iCT and ECT.
        prediction: the pair along which x moves to the earlier level, `FromData` or `FromTeacher`.
        averaged_target: whether the other image is of the weights `config.teacher` (`ema`), as in
            CT, and not of those in training. Not in distillation, where these are the teacher's.
    """

    pairs: Pairs = Neighbours()
    metric: Metric = SQUARE
    power: NotNegative[Scalar] = 0.0
    prediction: FromData | FromTeacher = DATA
    averaged_target: bool = field(default=False, metadata={"static": True})

    @property
    def traits(self) -> Traits:
        return replace(
            super().traits,
            meaning=Meaning.END_OF_FLOW,
            solver="consistency",
            has_teacher=self.averaged_target or self.prediction.distils,
            distils=self.prediction.distils,
            guides_teacher=self.prediction.distils,
        )

    def __call__(
        self,
        apply: Apply,
        params: Any,
        teacher_params: Any,
        key: OneKey,
        batch: Batch,
        progress: Progress,
    ) -> tuple[PerSample, dict[str, Array]]:
        time_key, key = jax.random.split(key)
        drawn = self.times.quantile(self.uniforms(time_key, len(batch["image"])), self.path)
        ends = jnp.stack([jnp.asarray(self.path.t_min), jnp.asarray(self.path.t_noise)])
        lowest, highest = level_of(self.path, ends)
        sigma, earlier = self.pairs(level_of(self.path, drawn), lowest, highest, progress.fraction)
        t, t_to = (
            time_of_level(self.path, sigma),
            time_of_level(self.path, jnp.maximum(earlier, lowest)),
        )
        noised = self.noised(t, key, batch)

        def end(params: Any, x: Array, t: Array) -> Array:
            return self.predict(apply, params, noised)(x, t, noised.cond).x0

        teacher = denoiser(apply, teacher_params, self.path, self.precond_for(noised.source))
        pair = self.prediction(teacher, noised, noised.x_t, t)
        x_to = mix(coeffs(self.path, t_to, noised.x_t.ndim), pair)
        target_params = teacher_params if self.averaged_target else params
        target = end(target_params, x_to, t_to)
        # The lowest of the levels is the path's own up to rounding.
        clean = jnp.reshape(earlier < 0.999 * lowest, noised.c.t.shape)
        target = jax.lax.stop_gradient(jnp.where(clean, pair.x0, target))
        weight = jnp.ravel(self.weight(noised.c, noised.k)) * (sigma - earlier) ** -self.power
        distance = self.metric(end(params, noised.x_t, t), target)
        return weight * distance, self.metrics(noised, t_to)

    def predict(self, apply: Apply, params: Any, noised: Noised) -> Predict:
        """`(x, t, cond) ->` the pair of the end of the flow, in training mode."""
        network, precond = in_training(apply, noised.key), self.precond_for(noised.source)
        return denoiser(network, params, self.path, precond)


def level_of(path: Path, t: AnyShape) -> AnyShape:
    """Noise to signal, `σ = s/a`, of the shape of `t`; at most e^7.5, where none is left."""
    return jnp.exp(-0.5 * jnp.maximum(log_snr(path, t), -15.0))


def time_of_level(path: Path, sigma: AnyShape) -> AnyShape:
    """The time of a noise level, of the shape of `sigma`."""
    return time_of_log_snr(path, -2.0 * jnp.log(sigma))
