"""Continuous-time consistency models: the end of the flow, learned from its derivative along it."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.errors import UserError
from diffjax.kinds import NotNegative, Probability
from diffjax.objectives.base import Batch, Progress, Traits
from diffjax.objectives.denoising import Noising, pixel_mean
from diffjax.objectives.derivatives import EXACT, Derivative
from diffjax.objectives.few_step.consistency import DATA, FromData, FromTeacher
from diffjax.process.paths import Scalar, coeffs
from diffjax.process.precond import Apply, Meaning, denoiser
from diffjax.process.targets import V
from diffjax.shapes import OneKey, PerSample, Samples


@register_dataclass
@dataclass(frozen=True)
class ContinuousConsistency(Noising):
    """sCM: the end of the flow `f = a·x - s·F`, whose derivative along the flow is 0.

    With the angle θ = atan2(s, a) of a path that preserves variance, `dx/dθ = a·eps - s·x0` and

        df/dθ = -a·(F - dx/dθ) - s·(x + dF/dθ)
        g = a·df/dθ,                     the second term times min(1, fraction/warm_up)
        loss = mean |F - sg(F + g/(‖g‖ + floor))|²

    The gradient is that of the consistency loss of an infinitely small step, with the weight that
    makes it bounded at both ends. It needs one derivative of the network in forward mode,
    `a·s·dF/dθ`, computed as one product so that nothing overflows in half precision. Dividing by
    the norm keeps one bad example from ruining the step, and moves the minimum off the end of the
    flow where the noise of g is skewed. With the wrapper
    `uncertainty_fourier` the loss has the paper's adaptive weight.

    Lu & Song 2024 (arXiv:2410.11081), algorithm 1, whose data have unit variance: with data of
    another variance levels shift, as `times` can.

    Attributes, beside those of `Noising`, whose target must be v:
        warm_up: the share of training in which the derivative of the network is faded in; the paper
            has 10,000 steps of 400,000.
        floor: added to the norm of g; 0.1 in the paper.
        normalised: whether g is divided by its norm.
        prediction: the pair that gives dx/dθ, `FromData`, or `FromTeacher` for distillation (sCD).
        derivative: how `a·s·dF/dθ` is computed, `Exact` or `CentralDifference`.
    """

    warm_up: Probability[Scalar] = 0.025
    floor: NotNegative[Scalar] = 0.1
    normalised: bool = field(default=True, metadata={"static": True})
    prediction: FromData | FromTeacher = DATA
    derivative: Derivative = EXACT

    @property
    def traits(self) -> Traits:
        return replace(
            super().traits,
            forward_mode=self.derivative.forward_mode,
            meaning=Meaning.END_OF_FLOW,
            solver="consistency",
            has_teacher=self.prediction.distils,
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
        if not isinstance(self.precond.target, V):
            raise UserError(
                f"scm learns from the derivative of v, not of {type(self.precond.target).__name__}:"
                " take target=v"
            )
        time_key, key = jax.random.split(key)
        t = self.times.quantile(self.uniforms(time_key, len(batch["image"])), self.path)
        noised = self.noised(t, key, batch)
        precond, c = self.precond_for(noised.source), noised.c
        teacher = denoiser(apply, teacher_params, self.path, precond)
        pair = self.prediction(teacher, noised, noised.x_t, t)
        slope = c.a * pair.eps - c.s * pair.x0

        def network(x_t: Samples, t: PerSample) -> Samples:
            inputs = precond.inputs(coeffs(self.path, t, x_t.ndim), x_t)
            return apply(params, *inputs, noised.cond, key=noised.key)

        # a·s·d/dθ, where dθ = (a·ds - s·da)·dt on a path that preserves variance.
        both = c.a * c.s
        clock = jnp.ravel(both / (c.a * c.ds - c.s * c.da))
        v, change = self.derivative(network, (noised.x_t, t), (both * slope, clock))
        faded = jnp.minimum(1.0, progress.fraction / jnp.maximum(self.warm_up, 1e-8))
        fixed = jax.lax.stop_gradient(v)
        tangent = -jnp.square(c.a) * (fixed - slope) - faded * (both * noised.x_t + change)
        if self.normalised:
            squares = jnp.sum(jnp.square(tangent), axis=tuple(range(1, v.ndim)), keepdims=True)
            tangent = tangent / (jnp.sqrt(squares) + self.floor)
        target = jax.lax.stop_gradient(fixed + tangent)
        squares = self.weight(c, noised.k) * jnp.square(v - target)
        return pixel_mean(squares), self.metrics(noised)
