"""Flow maps: networks of average velocities between two times, learned from themselves."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass
from jaxtyping import Float

from diffjax.conditions.guided import null_of, split
from diffjax.errors import UserError
from diffjax.kinds import AtLeastOne, NotNegative, Positive, Probability, Range
from diffjax.objectives.base import Batch, Progress, Traits
from diffjax.objectives.denoising import Noised, Noising, pixel_mean
from diffjax.objectives.derivatives import EXACT, Derivative
from diffjax.process.paths import Linear, Path, Scalar, coeffs
from diffjax.process.precond import Apply, Meaning, Precond, interval_inputs
from diffjax.process.targets import Clean, Velocity, decode, determinant, encode
from diffjax.shapes import OneKey, OneNumber, PerSample, Samples

Average = Callable[[Samples, PerSample, PerSample], Array]
"""`(x[B, …], t[B], t_to[B]) -> u[B, …]`, the average velocity from `t` to `t_to`."""


@register_dataclass
@dataclass(frozen=True)
class AverageVelocity(Noising):
    """Images at random times, for losses of the average velocity u(x_t, t, r) from t to r ≤ t.

    The network predicts u, or with `target=clean` the x0 of

        u = (x_t - x0)/t

    on the straight path, where that is an image without the network's own noise. Losses are those
    of u; `weight` is in the target's own space, as in every objective, so with `target=clean` the
    weight 1/t² is 1 on velocities. Lu et al. 2026 (arXiv:2601.22158).

    Where `r = t` the average velocity is the velocity. The attributes are those of `Noising`.
    """

    @property
    def traits(self) -> Traits:
        return replace(super().traits, meaning=Meaning.AVERAGE_VELOCITY, solver="flow_map")

    def average(self, apply: Apply, params: Any, noised: Noised) -> Average:
        """The network's average velocity, in training mode; of each of its outputs."""
        precond = self.precond_for(noised.source)

        def average(x: Samples, t: PerSample, t_to: PerSample) -> Array:
            inputs = interval_inputs(self.path, precond, x, t, t_to)
            output = apply(params, *inputs, noised.cond, key=noised.key)
            return average_of(self.path, precond, output, x, t)

        return average

    def velocity_of(self, noised: Noised) -> Samples:
        """The conditional velocity of each example, `[B, …]`."""
        return encode(Velocity()(noised.c), noised.pair)

    def squares(self, noised: Noised, difference: Samples) -> Samples:
        """The weighted square of a difference of velocities, `[B, …]`."""
        squares = self.weight(noised.c, noised.k) * jnp.square(difference)
        if isinstance(self.precond.target, Velocity):
            return squares
        ratio = determinant(noised.c, noised.k) / determinant(noised.c, Velocity()(noised.c))
        return jnp.square(ratio) * squares

    def check_target(self, loss: str) -> None:
        """Refuses targets of which no average velocity is known.

        Raises:
            UserError: the target is neither the velocity nor x0 on a straight path.
        """
        target = self.precond.target
        if not isinstance(target, (Velocity, Clean)):
            raise UserError(
                f"{loss} learns average velocities, not {type(target).__name__}: take "
                "target=velocity"
            )
        if isinstance(target, Clean) and not isinstance(self.path, Linear):
            raise UserError(
                f"{loss} with target=clean needs the straight path, not "
                f"{type(self.path).__name__}: take path=linear or target=velocity"
            )


def average_of(path: Path, precond: Precond, output: Array, x: Samples, t: PerSample) -> Array:
    """The average velocity from `x[B, …]` at `t[B]` that a network's output means.

    Of several outputs, in the channels, each.
    """
    if isinstance(precond.target, Velocity):
        return output
    x = jnp.concatenate([x] * (output.shape[-1] // x.shape[-1]), axis=-1)
    c = coeffs(path, t, x.ndim)
    return encode(Velocity()(c), decode(c, precond.target(c), output, x))


@register_dataclass
@dataclass(frozen=True)
class FlowMap(AverageVelocity):
    """Both times are drawn from `times` and put in order; some examples have `r = t`.

    There the loss is that of flow matching.

    Attributes, beside those of `Noising`, whose target must be the velocity or x0:
        between: the share of examples with `r < t`.
    """

    between: Probability[Scalar] = 0.25

    def intervals(self, key: OneKey, n: int) -> tuple[Float[Array, " {n}"], Float[Array, " {n}"]]:
        """Both times, `[n]` each: the later of two times, and for a share of them the other."""
        first, second, order, chosen = jax.random.split(key, 4)
        u = self.uniforms(first, n)
        # In another order, because the numbers may be sorted.
        v = jax.random.permutation(order, self.uniforms(second, n))
        one, other = (self.times.quantile(each, self.path) for each in (u, v))
        t = jnp.maximum(one, other)
        between = jax.random.bernoulli(chosen, self.between, (n,))
        return t, jnp.where(between, jnp.minimum(one, other), t)


def span_of(t: PerSample, t_to: PerSample, like: Samples) -> Array:
    """`t - t_to`, `[B, 1, …]`."""
    return jnp.reshape(t - t_to, (-1,) + (1,) * (like.ndim - 1))


def adaptive(distance: PerSample, power: Scalar, floor: Scalar) -> PerSample:
    """`distance/(distance + floor)^power`, with a constant denominator."""
    return distance / jax.lax.stop_gradient(distance + floor) ** power


@register_dataclass
@dataclass(frozen=True)
class GuidedFlowMap(FlowMap):
    """A flow map whose velocity v can be guided in training, so that one evaluation is guided.

    v is replaced by `omega·v + kappa·v(x_t | cond) + (1 - omega - kappa)·v(x_t)`, the last two by
    the network itself, at times from `guided_above` to `guided_below`: u then is the average
    velocity of a flow guided with the scale `omega/(1 - kappa)`. Conditions have to be dropped in
    training. (The authors' code gives examples whose condition is dropped the plain v; here they
    have the same mean.) Geng et al. 2025 (arXiv:2505.13447), equation 21.

    With the wrapper `EmbeddedGuidance` the scale w is that of each example, an input of the
    network, and `kappa = 1 - omega/w`: the flow map is that of the flow guided with w. v(x_t) is at
    the scale 1. (Improved MeanFlow's network also has the interval of guided times as inputs.) Geng
    et al. 2025 (arXiv:2512.02012), section 4.3.

    Attributes, beside those of `FlowMap`:
        omega: the share of the data's velocity in the guided one; 1 without guidance.
        kappa: share of the network's velocity with the condition; without effect where each
            example has a scale.
        guided_below: largest time at which there is guidance.
        guided_above: smallest one; 0.4 with `guided_below=0.65` in improved MeanFlow's B/2.
    """

    omega: Positive[float] = field(default=1.0, metadata={"static": True})
    kappa: Annotated[float, Range("[0, 1)")] = field(default=0.0, metadata={"static": True})
    guided_below: NotNegative[Scalar] = 1.0
    guided_above: NotNegative[Scalar] = 0.0

    def guided(self, apply: Apply, params: Any, noised: Noised, t: PerSample) -> Samples:
        """The conditional velocity of each example, `[B, …]`, with guidance where it is on."""
        velocity = self.velocity_of(noised)
        _, scale = split(noised.cond)
        kappa: Any = self.kappa
        if scale is not None:
            kappa = 1.0 - self.omega / jnp.reshape(scale, (-1,) + (1,) * (velocity.ndim - 1))
        elif self.omega == 1.0 and not kappa:
            return velocity
        precond = self.precond_for(noised.source)
        inputs = interval_inputs(self.path, precond, noised.x_t, t, t)

        def own(cond: Any) -> Samples:
            output = apply(params, *inputs, cond)
            # The last output is the velocity where there is one for it.
            return average_of(self.path, precond, output, noised.x_t, t)[..., -channels:]

        channels = noised.x_t.shape[-1]

        guided = self.omega * velocity + (1.0 - self.omega - kappa) * own(null_of(noised.cond))
        if scale is not None or kappa:
            guided = guided + kappa * own(noised.cond)
        inside = (self.guided_above <= t) & (t <= self.guided_below)
        inside = jnp.reshape(inside, (-1,) + (1,) * (velocity.ndim - 1))
        return jax.lax.stop_gradient(jnp.where(inside, guided, velocity))


@register_dataclass
@dataclass(frozen=True)
class Shortcut(FlowMap):
    """Shortcut models: a step is two steps of half its length, which the network itself takes.

        u(x_t, t, t - 2d) = ½·(u(x_t, t, t - d) + u(x', t - d, t - 2d))
        x' = x_t - d·u(x_t, t, t - d)

    for `2d` of `1, ½, ¼, …` of the time from 0 to t_noise and times t that are multiples of it, by
    the weights `config.teacher` (an average); the other examples are flow matching. The halves of
    the shortest step are taken for instants, where u is the velocity. Frans et al. 2024
    (arXiv:2410.12557), algorithm 1. (The authors' code also clips x' and the target to ±4.)

    Attributes, beside those of `FlowMap`; `between` is ¼ in the paper:
        sections: half of the shortest step is one of so many sections of time, a power of 2; 128
            in the paper.
    """

    between: Probability[float] = field(default=0.25, metadata={"static": True})
    sections: AtLeastOne[int] = field(default=128, metadata={"static": True})

    @property
    def traits(self) -> Traits:
        return replace(super().traits, has_teacher=True)

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
        self.check_target("shortcut")
        time_key, key = jax.random.split(key)
        n = len(batch["image"])
        # The first ones, so that no others pay for the two evaluations of the target.
        first = math.ceil(self.between * n)
        t, t_to = self.steps(time_key, n, first)
        noised = self.noised(t, key, batch)
        target = self.velocity_of(noised)
        if first:
            head = jax.tree.map(lambda x: x[:first], (noised.x_t, noised.cond, noised.source))
            x, cond, source = head
            own = self.average(apply, teacher_params, noised._replace(cond=cond, source=source))
            two = self.two_steps(own, x, t[:first], t_to[:first])
            target = jnp.concatenate([jax.lax.stop_gradient(two), target[first:]])
        u = self.average(apply, params, noised)(noised.x_t, t, t_to)
        return pixel_mean(self.squares(noised, u - target)), self.metrics(noised, t_to)

    def steps(self, key: OneKey, n: int, first: int) -> tuple[PerSample, PerSample]:
        """Times `[n]`, and the ends of the steps from them; equal but for the first ones."""
        draw_key, length_key, place_key = jax.random.split(key, 3)
        t = self.times.quantile(self.uniforms(draw_key, n), self.path)
        halvings = int(math.log2(self.sections))
        halved = jax.random.randint(length_key, (first,), 0, max(halvings, 1))
        length = 0.5 ** halved.astype(t.dtype)
        places = jnp.floor(jax.random.uniform(place_key, (first,)) / length)
        begin = self.path.t_noise * (1.0 - places * length)
        end = self.path.t_noise * (1.0 - (places + 1.0) * length)
        return jnp.concatenate([begin, t[first:]]), jnp.concatenate([end, t[first:]])

    def two_steps(self, own: Average, x: Samples, t: PerSample, t_to: PerSample) -> Samples:
        """The mean of the velocities of two half steps, `[B, …]`."""
        half = 0.5 * (t - t_to)
        middle = t - half
        # Half of the shortest step, one section, is taken for an instant.
        short = half < 1.5 * self.path.t_noise / self.sections
        one = own(x, t, jnp.where(short, t, middle))
        there = x - span_of(t, middle, x) * one
        return 0.5 * (one + own(there, middle, jnp.where(short, middle, t_to)))


@register_dataclass
@dataclass(frozen=True)
class AlphaFlow(GuidedFlowMap):
    """α-Flow: from flow matching to MeanFlow, without a derivative of the network.

        u(x_t, t, r) = α·v + (1 - α)·sg u(x_s, s, r)
        s = t - α·(t - r),      x_s = x_t - (t - s)·v

    with the velocity v of the example, or guided, whose loss is `‖Δ‖²/α·(‖Δ‖²/α² + floor)^-power`.
    At `α = 1` it is flow matching along the whole interval, at ½ a shortcut, and as α goes to 0 its
    gradient is MeanFlow's, by a finite difference in place of the JVP. In training
    `α = sigmoid(steepness·(middle - fraction))`, at least `smallest`.

    Zhang et al. 2025 (arXiv:2510.20771), who take MeanFlow itself under `smallest`.

    Attributes, beside those of `GuidedFlowMap`:
        power: the exponent of the adaptive weight, as in `MeanFlow`.
        floor: added to the denominator of the adaptive weight.
        steepness: the steepness of the curriculum; 25 in the paper. With 0, α stays ½.
        middle: the fraction of training at which α is ½.
        smallest: 0.005 in the paper. Rounding is 1e-7/α of the network's outputs in float32, and
            1e-2/α in bfloat16: there take 0.1 or more.
    """

    power: NotNegative[Scalar] = 1.0
    floor: Positive[Scalar] = 0.01
    steepness: NotNegative[Scalar] = 25.0
    middle: Probability[Scalar] = 0.5
    smallest: Annotated[Scalar, Range("(0, 1]")] = 0.005

    def alpha(self, fraction: OneNumber) -> OneNumber:
        """α when this fraction of training is done, `[]`."""
        return jnp.maximum(jax.nn.sigmoid(self.steepness * (self.middle - fraction)), self.smallest)

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
        self.check_target("alpha_flow")
        time_key, key = jax.random.split(key)
        t, t_to = self.intervals(time_key, len(batch["image"]))
        noised = self.noised(t, key, batch)
        average = self.average(apply, params, noised)
        velocity = self.guided(apply, params, noised, t)
        alpha = self.alpha(progress.fraction)
        difference = finite_difference(average, noised.x_t, (t, t_to), velocity, alpha)
        squares = self.squares(noised, difference)
        distance = jnp.sum(squares, axis=tuple(range(1, velocity.ndim)))
        return alpha * adaptive(distance, self.power, self.floor), self.metrics(noised, t_to)


def finite_difference(
    average: Average,
    x: Samples,
    times: tuple[PerSample, PerSample],
    velocity: Samples,
    alpha: Array,
) -> Samples:
    """`(u - α·v - (1 - α)·sg u(x_s, s, r))/α`, `[B, …]`, of MeanFlow's identity with a step of α.

    Args:
        average: u.
        x: the images at time t, `[B, …]`.
        times: t and r, `[B]` each.
        velocity: v, `[B, …]`.
        alpha: `[]` or `[B]`.
    """
    t, t_to = times
    middle = t - alpha * (t - t_to)
    there = x - span_of(t, middle, velocity) * velocity
    later = jax.lax.stop_gradient(average(there, middle, t_to))
    share = jnp.reshape(alpha, (-1,) + (1,) * (x.ndim - 1)) if jnp.ndim(alpha) else alpha
    return (average(x, t, t_to) - (share * velocity + (1.0 - share) * later)) / share


class Learned(NamedTuple):
    """The two sides of a rule: what is trained, and what it should be, without gradient."""

    value: Array
    target: Array


class Rule(Protocol):
    """An identity of a flow map with itself.

    Attributes:
        forward_mode: whether it has derivatives of the network in forward mode.
    """

    @property
    def forward_mode(self) -> bool: ...

    def __call__(
        self, average: Average, x: Samples, t: PerSample, t_to: PerSample, key: OneKey
    ) -> Learned:
        """Both sides for steps from `x[B, …]` at `t[B]` to `t_to[B]`."""
        ...


def moving_end(
    average: Average, x: Samples, times: tuple[PerSample, PerSample], derivative: Derivative
) -> tuple[Samples, Samples]:
    """The end of a step, `X = x - (t - r)·u`, and its derivative `∂X/∂r`.

    Args:
        average: u.
        x: the images at time t, `[B, …]`.
        times: t and r, `[B]` each.
        derivative: how ∂u/∂r is computed.
    """
    t, t_to = times
    u, change = derivative(lambda r: average(x, t, r), (t_to,), (jnp.ones_like(t_to),))
    span = span_of(t, t_to, x)
    return x - span * u, u - span * change


@register_dataclass
@dataclass(frozen=True)
class Lagrangian:
    """The end of a step moves with the velocity there: `∂X/∂r = v(X, r)` for `X = x - (t - r)·u`.

    The network's velocity is its average over no time. One derivative in r, through which the
    gradient goes.

    Attributes:
        derivative: how it is computed, `Exact` or `CentralDifference`.
    """

    derivative: Derivative = EXACT

    @property
    def forward_mode(self) -> bool:
        return self.derivative.forward_mode

    def __call__(
        self, average: Average, x: Samples, t: PerSample, t_to: PerSample, key: OneKey
    ) -> Learned:
        del key
        end, motion = moving_end(average, x, (t, t_to), self.derivative)
        return Learned(motion, average(jax.lax.stop_gradient(end), t_to, t_to))


@register_dataclass
@dataclass(frozen=True)
class Eulerian:
    """The end of a step stays where it is as its begin moves along the flow: `dX/dt = 0`.

        u = v - (t - r)·du/dt,      du/dt = v·∂u/∂x + ∂u/∂t

    MeanFlow's identity with the network's own velocity in the place of the conditional one.

    Attributes:
        derivative: how du/dt is computed, `Exact` or `CentralDifference`.
    """

    derivative: Derivative = EXACT

    @property
    def forward_mode(self) -> bool:
        return self.derivative.forward_mode

    def __call__(
        self, average: Average, x: Samples, t: PerSample, t_to: PerSample, key: OneKey
    ) -> Learned:
        del key
        velocity = jax.lax.stop_gradient(average(x, t, t))
        tangents = (velocity, jnp.ones_like(t))
        u, change = self.derivative(lambda x, t: average(x, t, t_to), (x, t), tangents)
        return Learned(u, velocity - span_of(t, t_to, x) * change)


@register_dataclass
@dataclass(frozen=True)
class Progressive:
    """A step is two steps, to a random time between and on. No derivative.

    u(x, t, r) = share·u(x, t, s) + (1 - share)·u(X, s, r),     s = t - share·(t - r)
    """

    forward_mode = False

    def __call__(
        self, average: Average, x: Samples, t: PerSample, t_to: PerSample, key: OneKey
    ) -> Learned:
        share = jax.random.uniform(key, t.shape)
        middle = t - share * (t - t_to)
        first = jax.lax.stop_gradient(average(x, t, middle))
        second = average(x - span_of(t, middle, x) * first, middle, t_to)
        share = jnp.reshape(share, (-1,) + (1,) * (x.ndim - 1))
        return Learned(average(x, t, t_to), share * first + (1.0 - share) * second)


@register_dataclass
@dataclass(frozen=True)
class SelfDistilled(FlowMap):
    """A flow map by self-distillation: flow matching where `r = t`, an identity elsewhere.

        loss = mean |value - sg target|²

    Boffi, Albergo & Vanden-Eijnden 2025 (arXiv:2505.18825), whose Lagrangian rule trains most
    stably; their two losses are added, and here each example has one of them.

    Attributes, beside those of `FlowMap`:
        rule: `Lagrangian`, `Eulerian` or `Progressive`.
    """

    rule: Rule = Lagrangian()

    @property
    def traits(self) -> Traits:
        return replace(super().traits, forward_mode=self.rule.forward_mode)

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
        self.check_target("flow_map")
        time_key, rule_key, key = jax.random.split(key, 3)
        t, t_to = self.intervals(time_key, len(batch["image"]))
        noised = self.noised(t, key, batch)
        average = self.average(apply, params, noised)
        value, target = self.rule(average, noised.x_t, t, t_to, rule_key)
        same = span_of(t, t_to, value) == 0.0
        target = jnp.where(same, self.velocity_of(noised), target)
        squares = self.squares(noised, value - jax.lax.stop_gradient(target))
        return pixel_mean(squares), self.metrics(noised, t_to)
