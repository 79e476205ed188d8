"""Log-likelihoods by the probability-flow ODE, integrated from data to noise.

Along the velocity `v = a'·x0(x, t) + s'·eps(x, t)` the log-density changes by minus the divergence
of `v` (instantaneous change of variables). So

    log p(x_min)  = log N(x_noise; 0, s(t_noise)²·I) + ∫ ∇·v(x_t, t) dt,   t from t_min to t_noise
    log p(x)      = log p(x_min) + d·log a(t_min),                         x_min = a(t_min)·x

No network is evaluated below `t_min`: the data `x` are taken for `x_min / a(t_min)`. The result is
the exact likelihood of the model that integrates from the prior to `t_min`. It differs from that of
clean data by the noise `s/a` that is left at `t_min`, a bias of `½·(s/a)²·Δp/p`. Song et al. 2021
(arXiv:2011.13456), section 4.3.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from diffjax.compiling import implicit_promotion
from diffjax.process.paths import Path, coeffs
from diffjax.process.precond import Predict
from diffjax.sampling.adaptive import import_diffrax
from diffjax.sampling.grids import Grid, Power
from diffjax.shapes import Keys, OneKey, OneNumber, Samples

# The number of tangents that go through the network at the same time.
_TANGENTS_AT_ONCE = 64


class LogLikelihood(NamedTuple):
    """Log-likelihoods of a batch.

    Attributes:
        log_p: `[B]`, nats.
        standard_error: `[B]`, nats, of the estimated divergence: 0 if the trace is exact, NaN for a
            single probe. The discretisation error of the ODE is not included; compare with half as
            many steps.
        nfe: the number of network evaluations per sample, each with one tangent per probe.
    """

    log_p: Array
    standard_error: Array
    nfe: Array


class TraceEstimator(Protocol):
    """A way to compute a divergence, the trace of a Jacobian `J`, from products `zᵀ·J·z`."""

    def probes(self, key: OneKey, shape: tuple[int, ...]) -> Float[Array, " probes *event"]:
        """The vectors `z`, `[P, *shape]`, of one sample; the same at all times."""
        ...

    def total(self, products: Float[Array, " probes"]) -> tuple[OneNumber, OneNumber]:
        """The trace and its standard error, from the products `zᵀ·J·z`, `[P]`."""
        ...


@dataclass(frozen=True)
class Hutchinson:
    """Hutchinson's estimate of the divergence: `tr J = E[zᵀ·J·z]` over random `z`.

    `z` has mean 0 and unit covariance. The estimate is unbiased and costs one tangent per probe.
    Grathwohl et al. 2018 (arXiv:1810.01367).

    Attributes:
        num_probes: the number of `z`. The error is proportional to `1/√num_probes`; at least 2 are
            needed for a standard error.
        draw: `(key, shape) -> z`. Rademacher has the smallest variance; `jax.random.normal` is the
            other common choice.
    """

    num_probes: int = 2
    draw: Callable[[Array, tuple[int, ...]], Array] = jax.random.rademacher

    def probes(self, key: OneKey, shape: tuple[int, ...]) -> Float[Array, " probes *event"]:
        return self.draw(key, (self.num_probes, *shape)).astype(jnp.float32)

    def total(self, products: Float[Array, " probes"]) -> tuple[OneNumber, OneNumber]:
        # With one probe the deviation is 0/0, the NaN that is promised.
        deviation = jnp.std(products, ddof=1)
        return jnp.mean(products), deviation / math.sqrt(self.num_probes)


@dataclass(frozen=True)
class ExactTrace:
    """The exact divergence `tr J = Σ_i J_ii`, at the cost of `d` tangents."""

    def probes(self, key: OneKey, shape: tuple[int, ...]) -> Float[Array, " probes *event"]:
        del key
        d = math.prod(shape)
        return jnp.eye(d).reshape(d, *shape)

    def total(self, products: Float[Array, " probes"]) -> tuple[OneNumber, OneNumber]:
        return jnp.sum(products), jnp.zeros(())


State = tuple[Array, Array]
"""Samples `[B, …]` and their products `∫ zᵀ·J·z dt`, `[B, P]`."""
Field = Callable[[Array, State], State]
"""`(t[], state) -> d state/dt`, with one evaluation of the network."""


class Integrate(Protocol):
    """An ODE solver from `t_min` to `t_noise` of a path, which counts its evaluations."""

    def __call__(self, field: Field, path: Path, state: State) -> tuple[State, Array]:
        """Returns the states at `t_noise` and the number of evaluations of the field."""
        ...


class OneStepMethod(NamedTuple):
    """An explicit one-step method for ODEs.

    Attributes:
        step: `(field, t[], h[], state) -> state` at `t + h`.
        nfe: the number of evaluations of the field per step.
    """

    step: Callable[[Field, Array, Array, State], State]
    nfe: int


def _ahead(state: State, *moves: tuple[Array, State]) -> State:
    """The state after moves along slopes, `state + Σ h·slope`."""
    for h, slope in moves:
        state = jax.tree.map(lambda y, k, h=h: y + h * k, state, slope)
    return state


def _heun(field: Field, t: Array, h: Array, y: State) -> State:
    k1 = field(t, y)
    k2 = field(t + h, _ahead(y, (h, k1)))
    return _ahead(y, (h / 2, k1), (h / 2, k2))


def _rk4(field: Field, t: Array, h: Array, y: State) -> State:
    k1 = field(t, y)
    k2 = field(t + h / 2, _ahead(y, (h / 2, k1)))
    k3 = field(t + h / 2, _ahead(y, (h / 2, k2)))
    k4 = field(t + h, _ahead(y, (h, k3)))
    return _ahead(y, (h / 6, k1), (h / 3, k2), (h / 3, k3), (h / 6, k4))


HEUN = OneStepMethod(_heun, nfe=2)
"""Heun's method, of second order."""
RK4 = OneStepMethod(_rk4, nfe=4)
"""The classical Runge-Kutta method, of fourth order."""


def rising_times(path: Path, num_steps: int, grid: Grid) -> Float[Array, " {num_steps}+1"]:
    """The times of a sampler's grid in increasing order, `t[n+1]` from `t_min` to `t_noise`.

    The last step of the sampler, to `t = 0`, is left out.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> from diffjax.sampling.grids import Power
        >>> rising_times(Linear(t_min=0.125), 3, Power()).tolist()
        [0.125, 0.5, 0.75, 1.0]
    """
    return grid(path, num_steps + 1)[-2::-1].at[0].set(path.t_min)


@dataclass(frozen=True)
class FixedSteps:
    """A fixed number of steps of one method, on a grid.

    Attributes:
        num_steps: the number of steps, each of `method.nfe` evaluations; typically 16 to 64.
        method: `RK4` or `HEUN`.
        grid: the times at which the steps end. The default has short steps near the data.
    """

    num_steps: int = 32
    method: OneStepMethod = RK4
    grid: Grid = field(default_factory=lambda: Power(exponent=2.0))

    def __call__(self, field: Field, path: Path, state: State) -> tuple[State, Array]:
        def body(state: State, interval: tuple[Array, Array]) -> tuple[State, None]:
            t, t_next = interval
            return self.method.step(field, t, t_next - t, state), None

        times = rising_times(path, self.num_steps, self.grid)
        state, _ = jax.lax.scan(body, state, (times[:-1], times[1:]))
        return state, jnp.asarray(self.num_steps * self.method.nfe)


@dataclass(frozen=True)
class AdaptiveSteps:
    """Adaptive steps, by diffrax: Tsitouras' pair of methods of order 4 and 5.

    All samples of a batch have the same steps, which the sample with the largest error determines.
    So each is within tolerance, but changes within the tolerance if the others change. A batch that
    needs more than `max_steps` returns NaN. In float32, tolerances below about 1e-6 can't be met.

    Attributes:
        tolerance: the relative and absolute tolerance per step, for the root mean square of a
            sample and for its log-density. Typically 1e-3 to 1e-5.
        max_steps: the largest number of steps, accepted and rejected ones together.
    """

    tolerance: float = 1e-4
    max_steps: int = 2048

    def __call__(self, field: Field, path: Path, state: State) -> tuple[State, Array]:
        diffrax = import_diffrax()
        control = diffrax.PIDController(
            rtol=self.tolerance, atol=self.tolerance, norm=_largest_root_mean_square
        )
        with implicit_promotion():
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, _: field(t, y)),
                diffrax.Tsit5(),
                t0=path.t_min,
                t1=path.t_noise,
                dt0=None,
                y0=state,
                stepsize_controller=control,
                max_steps=self.max_steps,
                throw=False,
            )
        done = solution.result == diffrax.RESULTS.successful
        end = jax.tree.map(lambda y: jnp.where(done, y[-1], jnp.nan), solution.ys)
        # Seven stages per step; the last is the first of the next step.
        return end, 6 * solution.stats["num_steps"] + 1


def _largest_root_mean_square(state: State) -> Array:
    """The largest root mean square over all samples, of the sample and of its products."""
    squares = [jnp.mean(jnp.square(y.reshape(len(y), -1)), axis=1) for y in state]
    return jnp.sqrt(jnp.max(jnp.stack(squares)))


@dataclass(frozen=True)
class OdeLogLikelihood:
    """The log-density of data under the probability-flow ODE, in nats.

    Element i of the result depends on `x[i]`, `keys[i]` and row i of `cond` alone (with
    `AdaptiveSteps`, up to the tolerance). Calls are pure: they work under `jax.jit` and with arrays
    that are sharded over a mesh.

    Attributes:
        integrate: the ODE solver, `FixedSteps(…)` or `AdaptiveSteps(…)`.
        trace: the computation of the divergence, `Hutchinson(…)` or `ExactTrace()`.

    Example:
        >>> from diffjax.process.paths import Linear, Pair, coeffs
        >>> def standard_normal(x, t, cond):  # the best denoiser of N(0, I)
        ...     c = coeffs(Linear(), t, x.ndim)
        ...     return Pair(c.a * x / (c.a**2 + c.s**2), c.s * x / (c.a**2 + c.s**2))
        >>> x, keys = jnp.zeros((1, 2)), jax.random.split(jax.random.key(0), 1)
        >>> result = OdeLogLikelihood()(standard_normal, Linear(), x, keys)
        >>> round(result.log_p.item(), 3), result.nfe.item()  # -log 2π = -1.838
        (-1.838, 128)
    """

    integrate: Integrate = FixedSteps()
    trace: TraceEstimator = Hutchinson()

    def __call__(
        self, predict: Predict, path: Path, x: Samples, keys: Keys, cond: Any = None
    ) -> LogLikelihood:
        """Computes the log-density of each of the data.

        Args:
            predict: the model; its prediction for one sample must not depend on the others.
            path: the path on which it was trained.
            x: `[B, …]`, clean data in the model's units; dequantise images first
                (`diffjax.likelihood.dequantise`).
            keys: `[B]`, one for each sample's probes.
            cond: the condition, B rows, or None for the null condition.

        Raises:
            UserError: `AdaptiveSteps` is used and diffrax is not installed.
        """
        axes = tuple(range(1, x.ndim))
        probes = jax.vmap(lambda key: self.trace.probes(key, x.shape[1:]), out_axes=1)(keys)

        def velocity(x: Array, t: Array) -> Array:
            c = coeffs(path, t[None], x.ndim)
            pair = predict(x, jnp.full(len(x), t), cond)
            return c.da * pair.x0 + c.ds * pair.eps

        def field(t: Array, state: State) -> State:
            # Samples are independent, so one tangent of the whole batch is one for each sample.
            v, push = jax.linearize(lambda x: velocity(x, t), state[0])
            products = jax.lax.map(
                lambda z: jnp.sum(z * push(z), axis=axes), probes, batch_size=_TANGENTS_AT_ONCE
            )
            return v, products.T

        t_min, t_noise = jnp.asarray(path.t_min), jnp.asarray(path.t_noise)
        start = (path.alpha(t_min) * x, jnp.zeros((len(x), len(probes))))
        (noise, products), nfe = self.integrate(field, path, start)
        divergence, error = jax.vmap(self.trace.total)(products)
        prior = jnp.sum(jax.scipy.stats.norm.logpdf(noise, scale=path.sigma(t_noise)), axis=axes)
        d = math.prod(x.shape[1:])
        return LogLikelihood(prior + divergence + d * jnp.log(path.alpha(t_min)), error, nfe)
