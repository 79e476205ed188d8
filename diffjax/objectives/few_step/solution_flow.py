"""Solution flow: the end of a step from t is that from a nearby time on the example's line."""

from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.kinds import NotNegative, Positive, Range
from diffjax.objectives.base import Batch, Progress
from diffjax.objectives.denoising import pixel_mean
from diffjax.objectives.few_step.flow_maps import GuidedFlowMap, adaptive, finite_difference
from diffjax.process.paths import Scalar
from diffjax.process.precond import Apply
from diffjax.process.times import LogitNormal, Times
from diffjax.shapes import OneKey, OneNumber, PerSample

BEGINS, ENDS = LogitNormal(0.2, 0.8), LogitNormal(-1.0, 0.8)


@register_dataclass
@dataclass(frozen=True)
class SolutionFlow(GuidedFlowMap):
    """SoFlow: the solution `f(x, t, s) = x - (t - s)·u(x, t, s)` does not change along the flow.

        Δ = (f(x_t, t, s) - sg f(x_l, l, s))/(t - l),    x_l = x_t - (t - l)·v
        l = t - α·(t - s),    α = first·(last/first)^fraction

    with the gradient `w·sg(Δ)·∂u`, negative, and `w = (mean Δ² + floor)^-power` in a share of
    examples, and flow matching with the same weight in the others. As `Δ = -(u - α·v - (1 -
    α)·u(x_l, l, s))/α`, this is α-Flow with other times, another schedule of α and half the weight
    for steps.

    Luo, Yuan & Liu 2025 (arXiv:2512.15657) and their code. With guidance of scale w and mixed with
    a share m, as theirs, `omega = m·w` and `kappa = 1 - m`; theirs for ImageNet-256 is w = 3, m = ¼
    (`omega=0.75,kappa=0.75`), and fades between t = 0.8 and 1, where this one is on up to
    `guided_below`.

    Attributes, beside those of `GuidedFlowMap`, whose times are those of flow matching; `between`
    is ¼ in the paper for ImageNet-256 and 1 for CIFAR-10:
        begins: the density of t in steps.
        ends: the density of s, where it is under t.
        first: α at the begin; 0.1 in the paper for ImageNet-256, 1 for CIFAR-10.
        last: α at the end; 0.002 in the paper for ImageNet-256, 0.0003 for CIFAR-10.
        shortest: the smallest `t - s` and `t - l`.
        power: the exponent of the adaptive weight; ¾ for CIFAR-10.
        floor: added to the mean square; 0.001 for CIFAR-10.
    """

    begins: Times = BEGINS
    ends: Times = ENDS
    first: Annotated[Scalar, Range("(0, 1]")] = 0.1
    last: Annotated[Scalar, Range("(0, 1]")] = 0.002
    shortest: Positive[Scalar] = 1e-4
    power: NotNegative[Scalar] = 1.0
    floor: Positive[Scalar] = 0.01

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
        self.check_target("solution_flow")
        time_key, key = jax.random.split(key)
        t, t_to = self.intervals(time_key, len(batch["image"]))
        noised = self.noised(t, key, batch)
        average = self.average(apply, params, noised)
        velocity = self.guided(apply, params, noised, t)
        alpha = self.alpha(progress.fraction, t - t_to)
        difference = finite_difference(average, noised.x_t, (t, t_to), velocity, alpha)
        distance = pixel_mean(self.squares(noised, difference))
        weight = jnp.where(t == t_to, alpha, 0.5 * alpha)
        return weight * adaptive(distance, self.power, self.floor), self.metrics(noised, t_to)

    def alpha(self, fraction: OneNumber, span: PerSample) -> PerSample:
        """The share `(t - l)/(t - s)` of steps of these lengths, `[B]`."""
        scheduled = self.first * (self.last / self.first) ** fraction
        # Over no time any share is flow matching.
        needed = self.shortest / jnp.maximum(span, self.shortest)
        return jnp.where(span == 0.0, 1.0, jnp.maximum(scheduled, needed))

    def intervals(self, key: OneKey, n: int) -> tuple[PerSample, PerSample]:
        """Times t and s of steps, and twice the time of flow matching, `[n]` each."""
        step_key, *keys = jax.random.split(key, 4)
        densities = (self.times, self.begins, self.ends)
        alone, begin, end = (
            density.quantile(self.uniforms(key, n), self.path)
            for density, key in zip(densities, keys, strict=True)
        )
        begin = jnp.maximum(begin, jnp.asarray(self.path.t_min) + self.shortest)
        end = jnp.minimum(end, begin - self.shortest)
        steps = jax.random.bernoulli(step_key, self.between, (n,))
        return jnp.where(steps, begin, alone), jnp.where(steps, end, alone)
