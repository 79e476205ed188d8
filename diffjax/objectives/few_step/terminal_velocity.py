"""Terminal velocity matching: a flow map whose end moves with the velocity there."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.conditions.guided import null_of, split
from diffjax.kinds import Positive
from diffjax.objectives.base import Batch, Progress, Traits
from diffjax.objectives.denoising import pixel_mean
from diffjax.objectives.derivatives import EXACT, Derivative
from diffjax.objectives.few_step.flow_maps import AverageVelocity, moving_end
from diffjax.process.bisection import bisect
from diffjax.process.precond import Apply
from diffjax.process.times import LogitNormal, Times
from diffjax.shapes import OneKey, PerSample

LENGTHS = LogitNormal(-0.8)


@register_dataclass
@dataclass(frozen=True)
class TerminalVelocity(AverageVelocity):
    """The velocity of the end of a step is the network's own there, and that is the data's.

        loss = mean |∂X/∂s - sg v̄(X, s)|² + mean |v(x_s', s') - (eps - x0)|²
        X = x_t - (t - s)·u(x_t, t, s),    v(x, s) = u(x, s, s)

    with `v̄` of the weights `config.teacher` (an average of decay 0.99 in the paper) and gradients
    through the derivative in s. It is the Lagrangian rule of `SelfDistilled`, with both losses for
    each example and an average for the velocity at the end. Lengths `t - s` are drawn first, then s
    where they fit, and s' apart.

    With guidance the data's velocity is replaced by `scale·(eps - x0) + (1 - scale)·v̄(x_s')`
    without condition, so that the map is that of the guided flow. Conditions have to be dropped in
    training: without one the mean stays what it was.

    Zhou, Parger, Haque & Song 2025 (arXiv:2511.19797) and their code, which draws s' apart. Theirs
    also divides the losses by the square of the scale, and multiplies the network by it. As there,
    each example can have a scale of its own, which the network has as an input (the wrapper
    `EmbeddedGuidance`).

    Attributes, beside those of `Noising`, whose times are s and s':
        lengths: the density of `t - s`, of which logit(length) ~ N(-0.8, 1) in the paper.
        derivative: how ∂X/∂s is computed, `Exact` or `CentralDifference`.
        guidance_scale: 1 is no guidance; 2 in the authors' config for one step on ImageNet-256.
            Without effect where each example has its own.
    """

    lengths: Times = LENGTHS
    derivative: Derivative = EXACT
    guidance_scale: Positive[float] = field(default=1.0, metadata={"static": True})

    @property
    def traits(self) -> Traits:
        return replace(super().traits, forward_mode=self.derivative.forward_mode, has_teacher=True)

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
        self.check_target("terminal_velocity")
        time_key, here_key, key = jax.random.split(key, 3)
        t, s = self.steps(time_key, len(batch["image"]))
        here = self.times.quantile(self.uniforms(here_key, len(batch["image"])), self.path)
        noised, at_here = (self.noised(time, key, batch) for time in (t, here))
        average = self.average(apply, params, noised)
        teacher = self.average(apply, teacher_params, noised)
        end, motion = moving_end(average, noised.x_t, (t, s), self.derivative)
        there = jax.lax.stop_gradient(teacher(end, s, s))
        terminal = self.squares(noised, motion - there)
        velocity = self.velocity_of(at_here)
        _, drawn = split(noised.cond)
        if drawn is not None or self.guidance_scale != 1.0:
            null = null_of(noised.cond)
            weak = self.average(apply, teacher_params, at_here._replace(cond=null))
            weak = jax.lax.stop_gradient(weak(at_here.x_t, here, here))
            scale: Any = self.guidance_scale
            if drawn is not None:
                scale = jnp.reshape(drawn, (-1,) + (1,) * (velocity.ndim - 1))
            velocity = scale * velocity + (1.0 - scale) * weak
        matching = self.squares(at_here, average(at_here.x_t, here, here) - velocity)
        return pixel_mean(terminal + matching), self.metrics(noised, s)

    def steps(self, key: OneKey, n: int) -> tuple[PerSample, PerSample]:
        """Steps from t to s, `[n]` each: a length, and s where it ends before `t_noise`."""
        length_key, end_key = jax.random.split(key)
        low, high = jnp.asarray(self.path.t_min), jnp.asarray(self.path.t_noise)
        length = self.lengths.quantile(self.uniforms(length_key, n), self.path) - low
        last = jnp.maximum(high - length, low)

        def times(u: PerSample) -> PerSample:
            return self.times.quantile(u, self.path)

        share = bisect(times, last, jnp.zeros(n), jnp.ones(n), 30)
        s = jnp.minimum(times(self.uniforms(end_key, n) * share), last)
        return jnp.minimum(s + length, high), s
