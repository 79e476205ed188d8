"""Objectives made of other objectives: what they add is stated once and works with any of them."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass
from jaxtyping import Float

from diffjax.kinds import Decay, Interval, NotNegative, Positive
from diffjax.objectives.base import Batch, Objective, Progress, Traits, check_others
from diffjax.objectives.denoising import Denoising
from diffjax.process.paths import Path, Scalar
from diffjax.process.precond import Apply, Precond
from diffjax.process.times import Times
from diffjax.shapes import AnyShape, OneKey, OneNumber, PerSample, Samples


class Wrapper(Objective):
    """An objective around another one, with which it shares everything but the loss."""

    objective: Any

    @property
    def path(self) -> Path:
        return self.objective.path

    @property
    def precond(self) -> Precond:
        return self.objective.precond

    @property
    def traits(self) -> Traits:
        return self.objective.traits

    def init_params(self, key: OneKey) -> dict[str, Any]:
        return self.objective.init_params(key)

    def init_memory(self) -> Any:
        return self.objective.init_memory()

    def effective_weight(self, log_snr: AnyShape) -> AnyShape:
        """That of the objective: what is added to it, or balanced by learning, is left out."""
        return self.objective.effective_weight(log_snr)

    def precond_for(self, source: Samples | None) -> Precond:
        return self.objective.precond_for(source)

    def noise_scale(self, t: OneNumber) -> OneNumber:
        return self.objective.noise_scale(t)

    def start(self, noise: Samples, source: Samples | None) -> Samples:
        return self.objective.start(noise, source)

    def update_memory(self, memory: Any, metrics: dict[str, Array]) -> Any:
        return self.objective.update_memory(memory, metrics)


@register_dataclass
@dataclass(frozen=True)
class Uncertainty(Wrapper):
    """EDM2's learned uncertainty: `loss/e^{u(λ)} + u(λ)`.

    The best `u` is the log of the mean loss at that log-SNR, so that each noise level counts by its
    relative error. Here `u` is a cosine series in log-SNR, trained with the network. Karras et al.
    2024 (arXiv:2312.02696), equation 21.

    Attributes:
        objective: what is balanced.
        num_terms: of the series.
        limit: log-SNR is clipped to ± this.
    """

    objective: Objective
    num_terms: Positive[int] = field(default=16, metadata={"static": True})
    limit: Positive[Scalar] = 20.0

    def init_params(self, key: OneKey) -> dict[str, Any]:
        return {**self.objective.init_params(key), "uncertainty": jnp.zeros(self.num_terms)}

    def __call__(
        self,
        apply: Apply,
        params: Any,
        teacher_params: Any,
        key: OneKey,
        batch: Batch,
        progress: Progress,
    ) -> tuple[PerSample, dict[str, Array]]:
        loss, metrics = self.objective(apply, params, teacher_params, key, batch, progress)
        u = self.log_loss(params["uncertainty"], metrics["log_snr"])
        return loss * jnp.exp(-u) + u, metrics

    def log_loss(self, series: Float[Array, " terms"], log_snr: AnyShape) -> AnyShape:
        """`u(λ)`, of the shape of `log_snr`."""
        share = (jnp.clip(log_snr, -self.limit, self.limit) + self.limit) / (2.0 * self.limit)
        terms = jnp.arange(self.num_terms, dtype=share.dtype)
        return jnp.cos(jnp.multiply.outer(jnp.pi * share, terms)) @ series


@register_dataclass
@dataclass(frozen=True)
class Importance(Wrapper):
    """Times drawn from `proposal`, each loss multiplied by `p(t)/p_proposal(t)`.

    The mean loss, and so the minimiser and the effective weight, stay those of the objective; only
    the variance changes. A proposal that is thin where the objective's density is not makes it
    worse.

    Attributes:
        objective: what is minimised.
        proposal: where the examples are drawn.
    """

    objective: Denoising
    proposal: Times

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
        objective, path = self.objective, self.path
        time_key, key = jax.random.split(key)
        t = self.proposal.quantile(objective.uniforms(time_key, len(batch["image"])), path)
        noised = objective.noised(t, key, batch)
        loss = objective.loss(noised, objective.ask(apply, params, noised))
        log_ratio = objective.times.log_density(t, path) - self.proposal.log_density(t, path)
        return jnp.exp(log_ratio) * loss, objective.metrics(noised)


@register_dataclass
@dataclass(frozen=True)
class Adaptive(Wrapper):
    """Importance sampling that learns where the loss is large, and stays exact.

    The uniform numbers behind the times are drawn from a histogram `q`, and each loss is divided
    by it. `q` follows running means of the loss: `q ∝ E[loss^power]^(1/power)`, mixed with a share
    of the uniform density. `power = 1` is VDM++'s adaptive schedule (Kingma & Gao 2023,
    arXiv:2303.00848, section 4), `power = 2` iDDPM's loss-second-moment resampling (Nichol &
    Dhariwal 2021, arXiv:2102.09672, section 3.3).

    Attributes:
        objective: what is minimised.
        power: the moment.
        uniform_share: of the examples; bounds the weights by its inverse.
        decay: of the running means, per step in which a bin has an example.
        num_bins: of the histogram.
    """

    objective: Denoising
    power: Positive[Scalar] = 2.0
    uniform_share: Annotated[Scalar, Interval("(0, 1]")] = 0.1
    decay: Decay[Scalar] = 0.98
    num_bins: Positive[int] = field(default=32, metadata={"static": True})

    def init_memory(self) -> Array:
        return jnp.ones(self.num_bins)

    def __call__(
        self,
        apply: Apply,
        params: Any,
        teacher_params: Any,
        key: OneKey,
        batch: Batch,
        progress: Progress,
    ) -> tuple[PerSample, dict[str, Array]]:
        del teacher_params
        objective = self.objective
        time_key, key = jax.random.split(key)
        density = self.density(progress.memory)
        u = self._quantile(density, objective.uniforms(time_key, len(batch["image"])))
        noised = objective.noised(objective.times.quantile(u, self.path), key, batch)
        loss = objective.loss(noised, objective.ask(apply, params, noised))
        bins = self._bin(u)
        metrics = {**objective.metrics(noised), "time_bin": bins, "unweighted_loss": loss}
        return loss / density[bins], metrics

    def update_memory(self, memory: Array, metrics: dict[str, Array]) -> Array:
        member = jax.nn.one_hot(metrics["time_bin"], self.num_bins)
        count = jnp.sum(member, axis=0)
        total = metrics["unweighted_loss"] ** self.power @ member
        moved = memory + (1.0 - self.decay) * (total / jnp.maximum(count, 1.0) - memory)
        return jnp.where(count > 0, moved, memory)

    def density(self, memory: Float[Array, " bins"]) -> Float[Array, " bins"]:
        """`q` in each bin of the unit interval, with mean 1."""
        size = memory ** (1.0 / self.power)
        return self.uniform_share + (1.0 - self.uniform_share) * size / jnp.mean(size)

    def _quantile(self, density: Array, u: Array) -> Array:
        mass = jnp.concatenate([jnp.zeros(1), jnp.cumsum(density) / self.num_bins])
        return jnp.interp(u, mass / mass[-1], jnp.linspace(0.0, 1.0, self.num_bins + 1))

    def _bin(self, u: Array) -> Array:
        return jnp.clip((u * self.num_bins).astype(jnp.int32), 0, self.num_bins - 1)


@register_dataclass
@dataclass(frozen=True)
class Contrastive(Wrapper):
    """Contrastive flow matching: the prediction is pushed away from another example's target.

    `loss - scale·w·mean_pixels (prediction - target_other)²`, the other being the next of the
    batch. It moves the minimiser away from the denoiser, on purpose. Stoica et al. 2025
    (arXiv:2506.05350), equation 5.

    Attributes:
        objective: what is added to.
        scale: of the second term; must be below 1.
    """

    objective: Denoising
    scale: Annotated[Scalar, Interval("[0, 1)")] = 0.05

    def __call__(
        self,
        apply: Apply,
        params: Any,
        teacher_params: Any,
        key: OneKey,
        batch: Batch,
        progress: Progress,
    ) -> tuple[PerSample, dict[str, Array]]:
        check_others(batch, "Contrastive")
        del teacher_params, progress
        objective = self.objective
        time_key, key = jax.random.split(key)
        u = objective.uniforms(time_key, len(batch["image"]))
        noised = objective.noised(objective.times.quantile(u, self.path), key, batch)
        output = objective.ask(apply, params, noised)
        # Another image and another noise, at the time at which the network was asked.
        other = noised._replace(pair=jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), noised.pair))
        loss = objective.loss(noised, output) - self.scale * objective.loss(other, output)
        return loss, objective.metrics(noised)


@register_dataclass
@dataclass(frozen=True)
class Dispersive(Wrapper):
    """Dispersive loss: hidden activations of a batch are pushed apart.

    `loss + scale·log mean_ij exp(-|z_i - z_j|²/temperature)`, with `|·|²` the mean over the
    activations of a middle layer. Wang & He 2025 (arXiv:2506.09027), equation 6.

    Attributes:
        objective: what is added to.
        scale: of the second term.
        temperature: of the distances.
    """

    objective: Denoising
    scale: NotNegative[Scalar] = 0.5
    temperature: Positive[Scalar] = 0.5

    def __call__(
        self,
        apply: Apply,
        params: Any,
        teacher_params: Any,
        key: OneKey,
        batch: Batch,
        progress: Progress,
    ) -> tuple[PerSample, dict[str, Array]]:
        check_others(batch, "Dispersive")
        del teacher_params, progress
        objective = self.objective
        time_key, key = jax.random.split(key)
        u = objective.uniforms(time_key, len(batch["image"]))
        noised = objective.noised(objective.times.quantile(u, self.path), key, batch)
        output, hidden = objective.ask(apply, params, noised, hidden=True)
        loss = objective.loss(noised, output) + self.scale * self.dispersion(hidden)
        return loss, objective.metrics(noised)

    def dispersion(self, hidden: Samples) -> OneNumber:
        """`log mean_ij exp(-|z_i - z_j|²/temperature)`, `[]`, for activations `[B, …]`."""
        z = jnp.reshape(hidden, (len(hidden), -1)).astype(jnp.float32)
        squares = jnp.mean(z**2, axis=1)
        distances = squares[:, None] + squares[None] - 2.0 * (z @ z.T) / z.shape[1]
        n = len(z)
        return jax.nn.logsumexp(-distances / self.temperature) - 2.0 * jnp.log(n)
