"""What stands between path and network: the target, the input's scale, the noise label."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass
from jaxtyping import Float

from diffjax.kinds import Positive
from diffjax.process.paths import Coeffs, Pair, Path, Scalar, coeffs, log_snr_of
from diffjax.process.targets import Target, chord, decode
from diffjax.shapes import Intervals, PerSample, Samples


class Apply(Protocol):
    """A network behind a closure.

    Its output has the shape of `x`; where an objective asks for more, further channels follow.
    With `hidden=True` it returns the pair of output and activations `[B, …]` of a middle layer.
    """

    def __call__(
        self,
        params: Any,
        x: Array,
        noise_label: Array,
        cond: Array | None,
        *,
        train: bool = False,
        key: Array | None = None,
    ) -> Array: ...


Predict = Callable[[Array, Array, Array | None], Pair]
"""`(x[B, …], t[B], cond[B] or None) -> Pair`: what every sampler sees of a trained model.

One that knows the flow map takes `t[B, 2]` too: from which time, and to which.
"""


def time_of(t: PerSample | Intervals) -> PerSample:
    """When `x` is, `[B]`, of a time `[B]` or of two, `[B, 2]`."""
    return t if t.ndim == 1 else t[:, 0]


@register_dataclass
@dataclass(frozen=True)
class TimeLabel:
    """`scale·t`: the noise label that DDPM, DiT and SiT give their networks (scale 1,000)."""

    scale: Scalar = 1000.0

    def __call__(self, c: Coeffs) -> Array:
        return self.scale * c.t


@register_dataclass
@dataclass(frozen=True)
class LogSNRLabel:
    """`scale·clip(λ, -limit, limit)`: a noise label that means the same on every path.

    EDM's `c_noise = ¼·log σ` is `-λ/8`; the default is 200 times that, so that a frequency
    embedding made for 0 … 1,000 resolves it. Karras et al. 2022 (arXiv:2206.00364), table 1.
    """

    scale: Scalar = -25.0
    limit: Positive[Scalar] = 20.0

    def __call__(self, c: Coeffs) -> Array:
        return self.scale * jnp.clip(log_snr_of(c), -self.limit, self.limit)


@register_dataclass
@dataclass(frozen=True)
class Unscaled:
    """1: the network sees `x_t` itself."""

    def __call__(self, c: Coeffs) -> Array:
        return jnp.ones_like(c.t)


@register_dataclass
@dataclass(frozen=True)
class UnitVariance:
    """`1/√(a²·sigma_data² + s²)`: the network sees `x_t` at unit variance.

    EDM's `c_in`, on any path. Karras et al. 2022 (arXiv:2206.00364), table 1.

    Attributes:
        sigma_data: the data's standard deviation.
    """

    sigma_data: Positive[Scalar] = 0.5

    def __call__(self, c: Coeffs) -> Array:
        return 1.0 / jnp.hypot(self.sigma_data * c.a, c.s)


@register_dataclass
@dataclass(frozen=True)
class Precond:
    """What the network predicts and how it is asked.

    Attributes:
        target: `Coeffs -> Mix`.
        noise_label: `Coeffs ->` the network's second input, by which it knows the noise level.
        input_scale: `Coeffs ->` the factor of its first input.
    """

    target: Target
    noise_label: Callable[[Coeffs], Array]
    input_scale: Callable[[Coeffs], Array] = Unscaled()

    def inputs(self, c: Coeffs, x_t: Samples) -> tuple[Samples, PerSample]:
        """The network's inputs: the scaled image `[B, …]` and the noise label `[B]`."""
        return self.input_scale(c) * x_t, jnp.ravel(self.noise_label(c))


def denoiser(
    apply: Apply, params: Any, path: Path, precond: Precond, *, learned_variance: bool = False
) -> Predict:
    """A network as what every sampler needs: `(x, t, cond) -> (x0, eps)`.

    Args:
        apply: the network; of its output channels the first as many as `x` has are used.
        params: its parameters, live or averaged.
        path: the path it was trained on.
        precond: the target it was trained for.
        learned_variance: whether as many channels again are `2·share - 1`, the share of the largest
            variance in a reverse step's.
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


def flow_map(apply: Apply, params: Any, path: Path, precond: Precond) -> Predict:
    """A network of average velocities as what samplers need: `(x, t, cond) -> (x0, eps)`.

    Asked for one time it gives the pair of the velocity there, as every network does; for two the
    pair that mixes to `x` at the first and to where the flow carries it at the second (`chord`).

    Args:
        apply: the network, whose noise labels are `[B, 2]` (`interval_inputs`).
        params: its parameters, live or averaged.
        path: the path it was trained on.
        precond: how it is asked.
    """

    def predict(x: Array, t: Array, cond: Array | None) -> Pair:
        start = time_of(t)
        end = start if t.ndim == 1 else t[:, 1]
        output = apply(params, *interval_inputs(path, precond, x, start, end), cond)
        return decode(coeffs(path, start, x.ndim), chord(path, start, end, x.ndim), output, x)

    return predict


def interval_inputs(
    path: Path, precond: Precond, x_t: Samples, t: PerSample, t_to: PerSample
) -> tuple[Float[Array, " batch *shown"], Intervals]:
    """A network's inputs about the way from `t` to `t_to`: the scaled image and two noise labels.

    Returns:
        `[B, …]`, and `[B, 2]`: the label of `t`, and by how much it is more than that of `t_to`.
    """
    x, label = precond.inputs(coeffs(path, t, x_t.ndim), x_t)
    label_to = jnp.ravel(precond.noise_label(coeffs(path, t_to, x_t.ndim)))
    return x, jnp.stack([label, label - label_to], axis=-1)
