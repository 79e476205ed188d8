"""Mean flow: a network of average velocities, which samples in one step."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.kinds import NotNegative, Positive
from diffjax.objectives.base import Batch, Progress, Traits
from diffjax.objectives.denoising import Noised
from diffjax.objectives.derivatives import EXACT, Derivative
from diffjax.objectives.few_step.flow_maps import GuidedFlowMap, adaptive, span_of
from diffjax.process.paths import Scalar
from diffjax.process.precond import Apply
from diffjax.shapes import OneKey, PerSample


@register_dataclass
@dataclass(frozen=True)
class MeanFlow(GuidedFlowMap):
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

    Geng et al. 2025 (arXiv:2505.13447), algorithm 1 and equation 21. With `own_velocity` it is
    improved MeanFlow (Geng et al. 2025, arXiv:2512.02012): the derivative then does not depend on
    the noise of the example, so the target is less noisy, and the loss is that of a velocity,
    `u + (t - r)·du/dt`. One evaluation more. With `velocity_head` the network has a second output
    v(x_t, t, r) for the velocity, as in the authors' code, which adds `|Δ|²/(|Δ|² + floor)^power`
    with Δ = v - the example's velocity. (Theirs has blocks of its own; here it shares all but the
    last layer.)

    Attributes, beside those of `GuidedFlowMap`; `between` is ¼ in the paper, ½ in that of improved
    MeanFlow:
        power: the exponent of the adaptive weight: 0 is the squared error, 1 gives all examples
            nearly the same loss. The paper uses 0.5 to 1.
        floor: added to the denominator of the adaptive weight; 1e-3 to 1e-2.
        own_velocity: whether the derivative is along the network's own velocity, u(x_t, t, t) or
            v(x_t, t, t), and not along that of the example.
        velocity_head: whether the network has a second output for the velocity, which training
            alone uses.
        derivative: how du/dt is computed, `Exact` or `CentralDifference`.
    """

    power: NotNegative[Scalar] = 1.0
    floor: Positive[Scalar] = 0.01
    own_velocity: bool = field(default=False, metadata={"static": True})
    velocity_head: bool = field(default=False, metadata={"static": True})
    derivative: Derivative = EXACT

    @property
    def traits(self) -> Traits:
        outputs = 2 if self.velocity_head else 1
        return replace(super().traits, outputs=outputs, forward_mode=self.derivative.forward_mode)

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

        velocity = self.guided(apply, params, noised, t)
        along, channels = velocity, velocity.shape[-1]
        if self.own_velocity:
            along = jax.lax.stop_gradient(between(noised.x_t, t, t)[..., -channels:])
        found, change = self.derivative(average, (noised.x_t, t), (along, jnp.ones_like(t)))
        u, change = found[..., :channels], change[..., :channels]
        target = jax.lax.stop_gradient(velocity - span_of(t, t_to, u) * change)
        loss = self.distance(noised, u - target)
        if self.velocity_head:
            loss = loss + self.distance(noised, found[..., channels:] - velocity)
        return loss, self.metrics(noised, t_to)

    def distance(self, noised: Noised, difference: Array) -> PerSample:
        """The weighted square of a difference of velocities, with the adaptive weight, `[B]`."""
        squares = self.squares(noised, difference)
        total = jnp.sum(squares, axis=tuple(range(1, squares.ndim)))
        return adaptive(total, self.power, self.floor)
