"""The objective that diffusion and flow matching share: predict a mix of data and noise."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.objectives import couplings
from diffjax.objectives.base import Batch, Objective, Progress, Traits
from diffjax.objectives.couplings import Coupling
from diffjax.process import uniforms
from diffjax.process.paths import Coeffs, Pair, Path, coeffs, log_snr_of, mix, time_of_log_snr
from diffjax.process.precond import Apply, Precond
from diffjax.process.targets import Mix, determinant, encode
from diffjax.process.times import Times, log_snr_density
from diffjax.process.uniforms import Uniforms
from diffjax.process.weights import Weight
from diffjax.shapes import AnyShape, OneKey, PerSample, Samples


class Noised(NamedTuple):
    """A batch at random times, with its targets and the inputs of the network.

    Attributes:
        c: the path at the times, `[B, 1, …]` each.
        k: the target's coefficients there.
        pair: clean data and noise, `[B, …]` each.
        x_t: their mix.
        cond: the condition, B rows.
        key: for dropout.
        source: what the network sees beside `x_t`, `[B, …]`, if anything.
    """

    c: Coeffs
    k: Mix
    pair: Pair
    x_t: Array
    cond: Any
    key: Array
    source: Array | None = None


@register_dataclass
@dataclass(frozen=True)
class Noising(Objective):
    """Images at random times, `x_t = a·x0 + s·eps` with `t ~ times`, for a loss of a subclass.

    Attributes:
        path: shared with sampling.
        precond: target, noise label and input scale, shared with sampling.
        weight: `(Coeffs, Mix) -> [B, 1, …]`, in the target's own space.
        times: the density of `t`.
        uniforms: how the numbers behind the times are drawn.
        coupling: which noise goes with which image.
    """

    path: Path
    precond: Precond
    weight: Weight
    times: Times
    uniforms: Uniforms = uniforms.Independent()
    coupling: Coupling = couplings.Independent()

    @property
    def traits(self) -> Traits:
        return Traits(
            needs_source=self.coupling.needs_source,
            starts_at_source=self.coupling.starts_at_source,
            independent_noise=self.coupling.independent_noise,
        )

    def noised(self, t: PerSample, key: OneKey, batch: Batch) -> Noised:
        """The batch at times `t[B]`, with noise from `key`."""
        noise_key, coupling_key, dropout_key = jax.random.split(key, 3)
        x0 = batch["image"]
        c = coeffs(self.path, t, x0.ndim)
        pair = self.coupling(coupling_key, batch, jax.random.normal(noise_key, x0.shape))
        k = self.precond.target(c)
        return Noised(c, k, pair, mix(c, pair), batch["cond"], dropout_key)

    def at_random_times(self, key: OneKey, batch: Batch) -> Noised:
        """The batch with noise at times from `times`, one for each example."""
        time_key, key = jax.random.split(key)
        t = self.times.quantile(self.uniforms(time_key, len(batch["image"])), self.path)
        return self.noised(t, key, batch)

    def metrics(self, noised: Noised, t_to: PerSample | None = None) -> dict[str, Array]:
        """What is logged of each example.

        Args:
            noised: the batch.
            t_to: `[B]`, the other time of a loss of two times.
        """
        log_snr = {"log_snr": jnp.ravel(log_snr_of(noised.c))}
        if t_to is None:
            return log_snr
        return {**log_snr, "interval": jnp.stack([jnp.ravel(noised.c.t), t_to], axis=-1)}


def in_training(apply: Apply, key: OneKey | None) -> Apply:
    """The network in training mode, with one dropout key for all of its evaluations."""

    def evaluate(
        params: Any, x: Array, noise_label: Array, cond: Any, *, key: Array | None = key
    ) -> Array:
        return apply(params, x, noise_label, cond, key=key)

    return evaluate


@register_dataclass
@dataclass(frozen=True)
class Denoising(Noising):
    """Weighted squared error of the prediction at a random time.

    `loss = w(t)·mean_pixels (network(x_t, t) - (k_x·x0 + k_e·eps))²` with `t ~ times`. DDPM,
    v-prediction, flow matching and EDM are this with other values (Kingma & Gao 2023,
    arXiv:2303.00848). The attributes are those of `Noising`.
    """

    def __call__(
        self,
        apply: Apply,
        params: Any,
        teacher_params: Any,
        key: OneKey,
        batch: Batch,
        progress: Progress,
    ) -> tuple[PerSample, dict[str, Array]]:
        del teacher_params, progress
        noised = self.at_random_times(key, batch)
        return self.loss(noised, self.evaluate(apply, params, noised)), self.metrics(noised)

    def evaluate(self, apply: Apply, params: Any, noised: Noised, **options: Any) -> Any:
        """The network's output in training mode."""
        inputs = self.precond_for(noised.source).inputs(noised.c, noised.x_t)
        return apply(params, *inputs, noised.cond, key=noised.key, **options)

    def loss(self, noised: Noised, output: Samples) -> PerSample:
        """The weighted squared error of an output, `[B]`."""
        target = encode(noised.k, noised.pair)
        return pixel_mean(self.weight(noised.c, noised.k) * jnp.square(output - target))

    def effective_weight(self, log_snr: AnyShape) -> AnyShape:
        """The weight of the squared error of the noise per unit of log-SNR, `p(λ)·w·(D/a)²`.

        It combines target, path, weight and times: objectives with equal effective weights, up to
        a factor, minimise the same loss. Kingma & Gao 2023 (arXiv:2303.00848), section 2.

        Args:
            log_snr: any shape, finite, within the path's range.

        Example:
            >>> from diffjax.process import paths, precond, targets, times, weights
            >>> sides = [
            ...     Denoising(
            ...         paths.Cosine(), precond.Precond(target, precond.TimeLabel()), weight,
            ...         times.Uniform(),
            ...     )
            ...     for target, weight in (
            ...         (targets.V(), weights.Constant()), (targets.Clean(), weights.SNRPlusOne())
            ...     )
            ... ]
            >>> v, clean = (side.effective_weight(jnp.array([-2.0, 1.0])) for side in sides)
            >>> bool(jnp.allclose(v, clean, rtol=1e-4))
            True
        """
        flat = jnp.ravel(log_snr)
        t = time_of_log_snr(self.path, flat)
        c = coeffs(self.path, t, ndim=1)
        k = self.precond.target(c)
        per_noise = self.weight(c, k) * jnp.square(determinant(c, k) / c.a)
        return jnp.reshape(log_snr_density(self.times, self.path, t) * per_noise, log_snr.shape)


def pixel_mean(x: Samples) -> PerSample:
    """The mean over all but the first axis, `[B]`."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))
