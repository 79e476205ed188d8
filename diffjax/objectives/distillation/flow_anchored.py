"""Flow-anchored consistency models: a shortcut to the end, and the flow that it shortens."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.kinds import NotNegative, Positive
from diffjax.objectives.base import Batch, Progress, Traits
from diffjax.objectives.denoising import pixel_mean
from diffjax.objectives.derivatives import EXACT, Derivative
from diffjax.objectives.few_step.consistency import DATA, FromData, FromTeacher
from diffjax.objectives.few_step.flow_maps import FlowMap, adaptive, span_of
from diffjax.process.paths import Scalar
from diffjax.process.precond import Apply, flow_map_predictor
from diffjax.process.targets import encode
from diffjax.shapes import OneKey, PerSample, Samples


@register_dataclass
@dataclass(frozen=True)
class FlowAnchored(FlowMap):
    """FACM: the average velocity from t to the end, with the velocity at t as an anchor.

        anchor:  mean |u(x_t, t, t) - v|² + mean (1 - cos(u(x_t, t, t), v))
        end:     sin(½π·(1 - a))·e/(e + floor)^power,   e = mean |u - sg(u - r·clip(g))|²
        g = u - (v - t·du/dt),   u = u(x_t, t, 0),      r = 1 - a^relaxation

    with `clip` to ±1, a the path's factor of the data, and the cosine over the channels of a pixel.
    The derivative is along v, the example's velocity, or a teacher's with guidance. Both losses are
    of each example: twice the evaluations with a gradient. A teacher has the same network, of two
    times: its velocity is over no time.

    Peng et al. 2025 (arXiv:2507.03738), with the settings and the logit-normal times of the
    authors' code, whose script for ImageNet has `t = 2/π·atan(σ)` with a log-normal σ. Consistency
    alone forgets the flow, and becomes unstable; here both are trained.

    Attributes, beside those of `FlowMap`, whose `between` is not used:
        relaxation: the exponent of a in r; 0.5 in the authors' code.
        power: the exponent of the adaptive weight; 0.5 there.
        floor: added to its denominator; 1e-3 there.
        cosine: the weight of the cosine; 1 there.
        prediction: what the velocity is of, `FromData` or `FromTeacher`; there a teacher with a
            guidance of 1.75.
        derivative: how du/dt is computed, `Exact` or `CentralDifference`.
    """

    relaxation: Positive[Scalar] = 0.5
    power: NotNegative[Scalar] = 0.5
    floor: Positive[Scalar] = 0.001
    cosine: NotNegative[Scalar] = 1.0
    prediction: FromData | FromTeacher = DATA
    derivative: Derivative = EXACT

    @property
    def traits(self) -> Traits:
        return replace(
            super().traits,
            forward_mode=self.derivative.forward_mode,
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
        del progress
        self.check_target("facm")
        noised = self.at_random_times(key, batch)
        t, end = jnp.ravel(noised.c.t), jnp.zeros(len(noised.x_t))
        precond = self.precond_for(noised.source)
        teacher = flow_map_predictor(apply, teacher_params, self.path, precond)
        velocity = encode(noised.k, self.prediction(teacher, noised, noised.x_t, t))
        average = self.average(apply, params, noised)

        anchor = average(noised.x_t, t, t)
        weight = self.weight(noised.c, noised.k)
        loss = pixel_mean(weight * jnp.square(anchor - velocity))
        loss = loss + self.cosine * pixel_mean(1.0 - _cosine(anchor, velocity))

        tangents = (velocity, jnp.ones_like(t))
        u, change = self.derivative(lambda x, t: average(x, t, end), (noised.x_t, t), tangents)
        gap = u - (velocity - span_of(t, end, u) * change)
        relaxed = 1.0 - noised.c.a**self.relaxation
        target = jax.lax.stop_gradient(u - relaxed * jnp.clip(gap, -1.0, 1.0))
        distance = pixel_mean(weight * jnp.square(u - target))
        near = jnp.ravel(jnp.cos(0.5 * jnp.pi * noised.c.a))
        loss = loss + near * adaptive(distance, self.power, self.floor)
        return loss, self.metrics(noised, end)


def _cosine(one: Samples, other: Samples) -> Array:
    """The cosine over the last axis, `[B, …, 1]`; its gradient at zero is zero."""

    def size(x: Samples) -> Array:
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-16)

    return jnp.sum(one * other, axis=-1, keepdims=True) / (size(one) * size(other))
