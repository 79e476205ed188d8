"""Mean flow: a network of average velocities, which samples in one step."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.kinds import NotNegative, Positive, Range
from diffjax.objectives.base import Batch, Progress, Traits
from diffjax.objectives.denoising import Noised
from diffjax.objectives.derivatives import EXACT, Derivative
from diffjax.objectives.flow_maps import FlowMap, adaptive, span_of
from diffjax.process.paths import Scalar
from diffjax.process.precond import Apply, Precond, interval_inputs
from diffjax.process.targets import encode
from diffjax.shapes import OneKey, PerSample, Samples


@register_dataclass
@dataclass(frozen=True)
class MeanFlow(FlowMap):
    """The average velocity between two times, learned from its identity with the velocity.

    For `u(x_t, t, r) = 1/(t - r) ∫_r^t v(x_s, s) ds` along the flow,

        u = v - (t - r)·du/dt,      du/dt = v·∂u/∂x + ∂u/∂t

    The network predicts u. The right side is the target, without gradient, with the derivative of
    the network itself (`derivative`) and the conditional velocity for v. The loss of an example is
    `|Δ|²/(|Δ|² + floor)^power` with a constant denominator and `|Δ|²` summed over the image. A
    power above 0 puts less weight on targets far from their mean, and moves the minimum off the
    average velocity where the noise of the targets is skewed.
    With `r = t` it is flow matching. Ordinary solvers use `r = t`, the solver `flow_map` all r.

    Both times are drawn from the density `times` and put in order. Derivatives in time are of
    the noise label too: set its scale to 1 (`noise_label=time_unit`), not 1,000.

    With guidance, v is replaced by `omega·v + kappa·v(x_t | cond) + (1 - omega - kappa)·v(x_t)`,
    the last two by the network itself, at times below `guided_below`: u then is the average
    velocity of a flow guided with the scale `omega/(1 - kappa)`, in one evaluation. Conditions
    have to be dropped in training. (The authors' code gives examples whose condition is dropped the
    plain v; here they have the same mean.)

    Geng et al. 2025 (arXiv:2505.13447), algorithm 1 and equation 21. With `own_velocity` it is
    improved MeanFlow (Geng et al. 2025, arXiv:2512.02012), without its head for the velocity: the
    derivative then does not depend on the noise of the example, so the target is less noisy, and
    the loss is that of a velocity, `u + (t - r)·du/dt`. One evaluation more.

    Attributes, beside those of `FlowMap`; `between` is ¼ in the paper, ½ in that of improved
    MeanFlow:
        power: the exponent of the adaptive weight: 0 is the squared error, 1 gives all examples
            nearly the same loss. The paper uses 0.5 to 1.
        floor: added to the denominator of the adaptive weight; 1e-3 to 1e-2.
        omega: the share of the data's velocity in the guided one; 1 without guidance.
        kappa: share of the network's velocity with the condition.
        guided_below: largest time at which there is guidance.
        own_velocity: whether the derivative is along the network's own velocity u(x_t, t, t), and
            not along that of the example.
        derivative: how du/dt is computed, `Exact` or `CentralDifference`.
    """

    power: NotNegative[Scalar] = 1.0
    floor: Positive[Scalar] = 0.01
    omega: Positive[float] = field(default=1.0, metadata={"static": True})
    kappa: Annotated[float, Range("[0, 1)")] = field(default=0.0, metadata={"static": True})
    guided_below: NotNegative[Scalar] = 1.0
    own_velocity: bool = field(default=False, metadata={"static": True})
    derivative: Derivative = EXACT

    @property
    def traits(self) -> Traits:
        return replace(super().traits, forward_mode=self.derivative.forward_mode)

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
        self.check_target("mean_flow")
        time_key, key = jax.random.split(key)
        t, t_to = self.intervals(time_key, len(batch["image"]))
        noised = self.noised(t, key, batch)
        between = self.average(apply, params, noised)

        def average(x_t: Array, t: Array) -> Array:
            return between(x_t, t, t_to)

        velocity = self.velocity(apply, params, self.precond_for(noised.source), noised, t)
        along = velocity
        if self.own_velocity:
            along = jax.lax.stop_gradient(between(noised.x_t, t, t))
        u, change = self.derivative(average, (noised.x_t, t), (along, jnp.ones_like(t)))
        target = jax.lax.stop_gradient(velocity - span_of(t, t_to, u) * change)
        squares = self.weight(noised.c, noised.k) * jnp.square(u - target)
        distance = jnp.sum(squares, axis=tuple(range(1, u.ndim)))
        return adaptive(distance, self.power, self.floor), self.metrics(noised, t_to)

    def velocity(
        self, apply: Apply, params: Any, precond: Precond, noised: Noised, t: PerSample
    ) -> Samples:
        """The conditional velocity of each example, `[B, …]`, with guidance where it is on."""
        velocity = encode(noised.k, noised.pair)
        if self.omega == 1.0 and not self.kappa:
            return velocity
        inputs = interval_inputs(self.path, precond, noised.x_t, t, t)
        weak = apply(params, *inputs, None)
        guided = self.omega * velocity + (1.0 - self.omega - self.kappa) * weak
        if self.kappa:
            guided = guided + self.kappa * apply(params, *inputs, noised.cond)
        below = jnp.reshape(t <= self.guided_below, (-1,) + (1,) * (velocity.ndim - 1))
        return jax.lax.stop_gradient(jnp.where(below, guided, velocity))
