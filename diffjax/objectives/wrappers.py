"""Wrappers: changes of a loss that work with any objective."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass
from jaxtyping import Float

from diffjax.conditions import Guided
from diffjax.errors import UserError
from diffjax.kinds import AtLeastOne, Decay, NotNegative, Positive, Range
from diffjax.models.layers.magnitude import MPFunction
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

    def init_params(self, key: OneKey, hidden_size: int = 1) -> dict[str, Any]:
        return self.objective.init_params(key, hidden_size)

    def init_memory(self) -> Any:
        return self.objective.init_memory()

    def effective_weight(self, log_snr: AnyShape) -> AnyShape:
        """That of the objective, without added terms or learned balancing."""
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

    The optimal `u` is the log of the mean loss at that log-SNR, so every noise level has the same
    mean loss. Here `u` is a cosine series in log-SNR, trained with the network. Karras et al. 2024
    (arXiv:2312.02696), equation 21.

    Attributes:
        objective: the loss to balance.
        num_terms: the number of terms of the series; 8 to 32 are enough for a smooth loss.
        limit: log-SNR is clipped to `[-limit, limit]`; 20 covers all usual paths.
    """

    objective: Objective
    num_terms: Positive[int] = field(default=16, metadata={"static": True})
    limit: Positive[Scalar] = 20.0

    def init_params(self, key: OneKey, hidden_size: int = 1) -> dict[str, Any]:
        others = self.objective.init_params(key, hidden_size)
        return {**others, "uncertainty": jnp.zeros(self.num_terms)}

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
class FourierUncertainty(Uncertainty):
    """`Uncertainty` with the function u of EDM2's authors, random Fourier features of log σ.

        u(λ) = wᵀ √2·cos(f·c + φ)        c = -λ/8 = ¼·log σ,  |w| = 1

    Frequencies and phases are drawn once and are not trained. Published files of EDM2 hold u, which
    a network `EDM2` reads with its own parameters. Karras et al. 2024 (arXiv:2312.02696),
    equations 21 and 75.

    Attributes:
        objective: the loss to balance.
        num_terms: the number of features; 128 in EDM2.
        limit: log-SNR is clipped to `[-limit, limit]`.
    """

    num_terms: Positive[int] = field(default=128, metadata={"static": True})

    def init_params(self, key: OneKey, hidden_size: int = 1) -> dict[str, Any]:
        u = MPFunction(self.num_terms).init(key, jnp.zeros(1))["params"]
        return {**self.objective.init_params(key, hidden_size), "uncertainty": u}

    def log_loss(self, series: Any, log_snr: AnyShape) -> AnyShape:
        """`u(λ)`, of the shape of `log_snr`.

        Args:
            series: the parameters of u.
            log_snr: λ.
        """
        c = -jnp.clip(log_snr, -self.limit, self.limit) / 8.0
        u: Any = MPFunction(self.num_terms).apply({"params": series}, jnp.ravel(c))
        return u.reshape(jnp.shape(log_snr))


@register_dataclass
@dataclass(frozen=True)
class EmbeddedGuidance(Wrapper):
    """The scale of guidance as an input of the network, drawn for each example.

        p(w) ∝ w^-power,     lowest ≤ w ≤ highest

    An objective that guides what it learns from does so with the scale of each example: those with
    `FromTeacher`, those of `GuidedFlowMap`, `TerminalVelocity` and `Drifting`. So one network has a
    range of scales, each in one evaluation: with `against=embedded`, the `guidance_scale` of a
    recipe is that input. The network embeds it as one more noise label. An objective that guides
    nothing learns the same at all scales.

    Meng et al. 2023 (arXiv:2210.03142), section 3.1; Luo et al. 2023 (arXiv:2310.04378), equation
    14; Geng et al. 2025 (arXiv:2512.02012), section 4.3; Deng et al. 2026 (arXiv:2602.04770).

    Attributes:
        objective: the loss.
        lowest: the least scale; 1 is no guidance. 3 in the authors' code of latent consistency
            models for Stable Diffusion.
        highest: the largest one; 15 there, 8 in the code of improved MeanFlow, 4 in drifting's.
        power: 0 draws evenly, as there; 1 in improved MeanFlow, 3 or 5 in drifting.
    """

    objective: Objective
    lowest: AtLeastOne[float] = field(default=1.0, metadata={"static": True})
    highest: AtLeastOne[float] = field(default=8.0, metadata={"static": True})
    power: NotNegative[float] = field(default=0.0, metadata={"static": True})

    @property
    def traits(self) -> Traits:
        return replace(self.objective.traits, scales=(self.lowest, self.highest))

    def __call__(
        self,
        apply: Apply,
        params: Any,
        teacher_params: Any,
        key: OneKey,
        batch: Batch,
        progress: Progress,
    ) -> tuple[PerSample, dict[str, Array]]:
        if self.highest < self.lowest:
            raise UserError(
                f"embedded_guidance: highest={self.highest:g} is below lowest={self.lowest:g}"
            )
        scale_key, key = jax.random.split(key)
        scale = self.scales(jax.random.uniform(scale_key, (len(batch["image"]),)))
        guided = {**batch, "cond": Guided(batch["cond"], scale)}
        return self.objective(apply, params, teacher_params, key, guided, progress)

    def scales(self, u: PerSample) -> PerSample:
        """The scales below which a share `u[n]` of all lies, `[n]`.

        Example:
            >>> log_uniform = EmbeddedGuidance(None, 1.0, 9.0, power=1.0)
            >>> log_uniform.scales(jnp.array([0.0, 0.5, 1.0])).round(4).tolist()
            [1.0, 3.0, 9.0]
        """
        if self.power == 1.0:
            return self.lowest * (self.highest / self.lowest) ** u
        exponent = 1.0 - self.power
        low, high = self.lowest**exponent, self.highest**exponent
        return (low + u * (high - low)) ** (1.0 / exponent)


@register_dataclass
@dataclass(frozen=True)
class Importance(Wrapper):
    """Times from a density `proposal`, with each loss multiplied by `p(t)/p_proposal(t)`.

    The mean loss, and so the minimiser and the effective weight, are those of the objective. Only
    the variance changes. It grows if the proposal is small where the objective's density is large.

    Attributes:
        objective: the loss, with its density of times p.
        proposal: the density that times are drawn from; larger where the loss varies more.
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
        loss = objective.loss(noised, objective.evaluate(apply, params, noised))
        log_ratio = objective.times.log_density(t, path) - self.proposal.log_density(t, path)
        return jnp.exp(log_ratio) * loss, objective.metrics(noised)


@register_dataclass
@dataclass(frozen=True)
class Adaptive(Wrapper):
    """Importance sampling that draws times more often where the loss is large.

    The uniform numbers behind the times are drawn from a histogram `q`, and each loss is divided
    by it, so the mean loss is unchanged. `q` follows running means of the loss,

        q ∝ E[loss^power]^(1/power),

    mixed with a share of the uniform density. `power = 1` is VDM++'s adaptive schedule (Kingma &
    Gao 2023, arXiv:2303.00848, section 4), `power = 2` iDDPM's loss-second-moment resampling
    (Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.3).

    Attributes:
        objective: the loss.
        power: the moment of the loss, 1 or 2.
        uniform_share: the share of examples with uniform numbers; its inverse is the largest
            weight. Typically 0.05 to 0.3.
        decay: the decay of the running means, per step in which a bin has an example.
        num_bins: the number of bins of the histogram.
    """

    objective: Denoising
    power: Positive[Scalar] = 2.0
    uniform_share: Annotated[Scalar, Range("(0, 1]")] = 0.1
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
        loss = objective.loss(noised, objective.evaluate(apply, params, noised))
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
    """Contrastive flow matching: predictions move away from the targets of other examples.

        loss - scale·w·mean_pixels (prediction - target_other)²

    where the other example is the next one in the batch. The minimiser is intentionally not the
    denoiser. Stoica et al. 2025 (arXiv:2506.05350), equation 5.

    Attributes:
        objective: the first term.
        scale: the weight of the second term, from 0 to below 1; 0.05 in the paper.
    """

    objective: Denoising
    scale: Annotated[Scalar, Range("[0, 1)")] = 0.05

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
        noised = objective.at_random_times(key, batch)
        output = objective.evaluate(apply, params, noised)
        # Another image and another noise, at the time of the evaluation.
        other = noised._replace(pair=jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), noised.pair))
        loss = objective.loss(noised, output) - self.scale * objective.loss(other, output)
        return loss, objective.metrics(noised)


@register_dataclass
@dataclass(frozen=True)
class Dispersive(Wrapper):
    """Dispersive loss: hidden activations of different examples move apart.

        loss + scale·log mean_ij exp(-|z_i - z_j|²/temperature)

    with `|·|²` the mean over the activations of a middle layer. Wang & He 2025 (arXiv:2506.09027),
    equation 6.

    Attributes:
        objective: the first term.
        scale: the weight of the second term; 0.25 to 1 in the paper.
        temperature: the distance beyond which two examples hardly repel; 0.25 to 2 in the paper.
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
        noised = objective.at_random_times(key, batch)
        output, (hidden, *_) = objective.evaluate(apply, params, noised, hidden=True)
        loss = objective.loss(noised, output) + self.scale * self.dispersion(hidden)
        return loss, objective.metrics(noised)

    def dispersion(self, hidden: Samples) -> OneNumber:
        """`log mean_ij exp(-|z_i - z_j|²/temperature)`, `[]`, for activations `[B, …]`."""
        z = jnp.reshape(hidden, (len(hidden), -1)).astype(jnp.float32)
        squares = jnp.mean(z**2, axis=1)
        distances = squares[:, None] + squares[None] - 2.0 * (z @ z.T) / z.shape[1]
        n = len(z)
        return jax.nn.logsumexp(-distances / self.temperature) - 2.0 * jnp.log(n)
