"""Preconditioning: a network's target, the scale of its input and its noise label."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass
from jaxtyping import Float

from diffjax.kinds import Positive
from diffjax.process.paths import Coeffs, Pair, Path, Scalar, coeffs, log_snr_of
from diffjax.process.targets import Target, Velocity, chord, decode
from diffjax.shapes import Intervals, PerSample, Samples


class Apply(Protocol):
    """A network as a function of its parameters and inputs.

    In training there is a `key`, for dropout; without one the network is deterministic.

    The output has the shape of `x`. Where an objective needs more outputs (a variance), they are
    further channels. With `hidden=True`, a network that supports it returns the pair of the output
    and a tuple of the activations `[B, …]` of layers in its middle, most often of one.
    """

    def __call__(
        self,
        params: Any,
        x: Array,
        noise_label: Array,
        cond: Any,
        *,
        key: Array | None = None,
    ) -> Array: ...


Predict = Callable[[Array, Array, Any], Pair]
"""`(x[B, …], t[B], cond) -> Pair`: a trained model as samplers evaluate it.

The condition is a tree of arrays with B rows, or None for the null condition.

A model of the flow map also takes `t[B, 2]`: the time of `x`, and the time to step to.
"""


def time_of(t: PerSample | Intervals) -> PerSample:
    """The time of `x`, `[B]`, from times `[B]` or pairs of times `[B, 2]`."""
    return t if t.ndim == 1 else t[:, 0]


@register_dataclass
@dataclass(frozen=True)
class TimeLabel:
    """The noise label `scale·t + offset`, as in DDPM and DiT.

    Attributes:
        scale: 1,000 for networks with a sinusoidal embedding of the steps 0 … 1,000, as in DDPM
            and DiT. 1 where the network embeds times from 0 to 1. -1, with the offset 1, where its
            time is 0 for noise and 1 for data, as in SiT.
        offset: -1 where the 1,000 steps of a table count from 0, as in the published DDPM and DiT.
        whole: whether labels are rounded to whole numbers, as in diffusers' DPM-Solver++ on grids
            between the steps of a table.
    """

    scale: Scalar = 1000.0
    offset: Scalar = 0.0
    whole: bool = field(default=False, metadata={"static": True})

    def __call__(self, c: Coeffs) -> Array:
        label = self.scale * c.t + self.offset
        return jnp.round(label) if self.whole else label


@register_dataclass
@dataclass(frozen=True)
class LogSNRLabel:
    """The noise label `scale·clip(λ, -limit, limit) + offset`, of log-SNR: the same on every path.

    Karras et al. 2022 (arXiv:2206.00364), table 1.

    Attributes:
        scale: EDM's `c_noise = ¼·log σ` is `-λ/8`, a scale of -1/8. The default is 200 times that,
            for sinusoidal embeddings that are made for labels from 0 to 1,000.
        limit: the largest log-SNR, by absolute value, that the network can distinguish. At 20 the
            noise is e^-10 = 4.5e-5 of the signal, or the signal that of the noise.
        offset: NCSN++'s `log(σ/2)` is a scale of -1/2 and an offset of -log 2.
    """

    scale: Scalar = -25.0
    limit: Positive[Scalar] = 20.0
    offset: Scalar = 0.0

    def __call__(self, c: Coeffs) -> Array:
        return self.scale * jnp.clip(log_snr_of(c), -self.limit, self.limit) + self.offset


@register_dataclass
@dataclass(frozen=True)
class Unscaled:
    """Input scale 1: the network's input is `x_t` itself."""

    def __call__(self, c: Coeffs) -> Array:
        return jnp.ones_like(c.t)


@register_dataclass
@dataclass(frozen=True)
class UnitVariance:
    """Input scale `1/√(a²·sigma_data² + s²)`: the network's input has unit variance.

    This is EDM's `c_in` on any path. Karras et al. 2022 (arXiv:2206.00364), table 1.

    Attributes:
        sigma_data: the standard deviation of the data. EDM has 0.5, for images in [-1, 1].
    """

    sigma_data: Positive[Scalar] = 0.5

    def __call__(self, c: Coeffs) -> Array:
        return 1.0 / jnp.hypot(self.sigma_data * c.a, c.s)


class Meaning(StrEnum):
    """What the pair `(x0, eps)` of a decoded prediction is.

    Solvers, likelihoods and guidance use it: only posterior means give the velocity of the
    probability flow and its score.
    """

    POSTERIOR_MEAN = "posterior_mean"
    """`E[x0 | x_t]` and `E[eps | x_t]`, at one time."""
    AVERAGE_VELOCITY = "average_velocity"
    """The chord of the flow between two times; at two equal times it is the posterior mean."""
    END_OF_FLOW = "end_of_flow"
    """Where the flow from `x_t` ends, at time 0, as consistency models predict it."""

    def serves(self, needed: "Meaning") -> bool:
        """Whether a model of this meaning can be used where another one is needed.

        Example:
            >>> Meaning.AVERAGE_VELOCITY.serves(Meaning.POSTERIOR_MEAN)  # over no time
            True
            >>> Meaning.END_OF_FLOW.serves(Meaning.POSTERIOR_MEAN)
            False
        """
        over_no_time = (Meaning.AVERAGE_VELOCITY, Meaning.POSTERIOR_MEAN)
        return self is needed or (self, needed) == over_no_time

    def __str__(self) -> str:
        return f"the {self.value.replace('_', ' ').replace('of flow', 'of the flow')}"


@register_dataclass
@dataclass(frozen=True)
class Precond:
    """What a network predicts, and its two inputs.

        network(input_scale·x_t, noise_label) ≈ target

    Attributes:
        target: `Coeffs -> Mix`, what is predicted (`diffjax.process.targets`).
        noise_label: `Coeffs -> [B, 1, …]`, the number by which the network knows the noise level:
            `TimeLabel` or `LogSNRLabel`.
        input_scale: `Coeffs -> [B, 1, …]`, the factor of the noisy image: `Unscaled` or
            `UnitVariance`. It is needed where `x_t` grows large, as with variance exploding paths.
    """

    target: Target
    noise_label: Callable[[Coeffs], Array]
    input_scale: Callable[[Coeffs], Array] = Unscaled()

    def inputs(self, c: Coeffs, x_t: Samples) -> tuple[Samples, PerSample]:
        """The network's inputs: the scaled images `[B, …]` and the noise labels `[B]`."""
        return self.input_scale(c) * x_t, jnp.ravel(self.noise_label(c))


def denoiser(
    apply: Apply, params: Any, path: Path, precond: Precond, *, learned_variance: bool = False
) -> Predict:
    """The denoiser of a network, for samplers: `(x, t, cond) -> (x0, eps)`.

    Args:
        apply: the network. With `C` channels of `x`, the first `C` channels of its output are the
            prediction.
        params: its parameters, live or averaged.
        path: the path on which it was trained.
        precond: the preconditioning with which it was trained.
        learned_variance: whether the next `C` channels are `2·share - 1`, with `Pair.share` the
            variance of a reverse step.
    """

    def predict(x: Array, t: Array, cond: Array | None) -> Pair:
        c = coeffs(path, t, x.ndim)
        output = apply(params, *precond.inputs(c, x), cond)
        channels = x.shape[-1]
        pair = decode(c, precond.target(c), output[..., :channels], x)
        if not learned_variance:
            return pair
        return pair._replace(share=0.5 * (output[..., channels : 2 * channels] + 1.0))

    return predict


def flow_map_predictor(apply: Apply, params: Any, path: Path, precond: Precond) -> Predict:
    """The flow map of a network of average velocities, for samplers: `(x, t, cond) -> (x0, eps)`.

    For times `t[B]` it returns the pair of the velocity at `t`, as a denoiser does. For pairs of
    times `t[B, 2]` it returns the pair that mixes to `x` at the first time, and to the end of the
    flow from `x` at the second (`diffjax.process.targets.chord`).

    Args:
        apply: the network, whose noise labels are `[B, 2]` (`interval_inputs`). With `C` channels
            of `x`, the first `C` channels of its output are the prediction.
        params: its parameters, live or averaged.
        path: the path on which it was trained.
        precond: the preconditioning with which it was trained.
    """

    def predict(x: Array, t: Array, cond: Array | None) -> Pair:
        start = time_of(t)
        end = start if t.ndim == 1 else t[:, 1]
        output = apply(params, *interval_inputs(path, precond, x, start, end), cond)
        output = output[..., : x.shape[-1]]
        c = coeffs(path, start, x.ndim)
        if isinstance(precond.target, Velocity):
            return decode(c, chord(path, start, end, x.ndim), output, x)
        # Another target of a straight path is that of the pair at both ends.
        return decode(c, precond.target(c), output, x)

    return predict


def interval_inputs(
    path: Path, precond: Precond, x_t: Samples, t: PerSample, t_to: PerSample
) -> tuple[Float[Array, " batch *shown"], Intervals]:
    """A network's inputs for a step from `t` to `t_to`: the scaled images and two noise labels.

    Args:
        path: any path.
        precond: its input scale and noise label.
        x_t: the images at time `t`, `[B, …]`.
        t: `[B]`.
        t_to: `[B]`.

    Returns:
        The images `[B, …]`, and the labels `[B, 2]`: that of `t`, and its difference from that of
        `t_to`, `label(t) - label(t_to)`.
    """
    x, label = precond.inputs(coeffs(path, t, x_t.ndim), x_t)
    label_to = jnp.ravel(precond.noise_label(coeffs(path, t_to, x_t.ndim)))
    return x, jnp.stack([label, label - label_to], axis=-1)
