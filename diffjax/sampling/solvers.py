"""Solvers: one step from noise towards data, over one interval of a grid.

A solver uses only predictions `(x0, eps)`, so it works for every target, network and guidance. It
evaluates the denoiser itself, and declares the number of evaluations per step.

A step receives an `Interval` between two times of a grid. In the docstrings of the solvers

    a, s     the path's coefficients at the beginning of the step; a', s' those at its end
    ȧ, ṡ     their time derivatives, a' and s' in all other rooms
    v        ȧ·x0 + ṡ·eps, the velocity of the probability flow
    σ        s/a, the noise-to-signal ratio
    ℓ        log(a/s), the half-log-SNR: DPM-Solver's λ. Here λ = log(a²/s²) = 2ℓ is the log-SNR
    h        ℓ' - ℓ, above 0 on the way to the data
    q        σ'/σ = e^{-h}
    z        fresh standard normal noise
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.errors import UserError
from diffjax.kinds import Probability
from diffjax.process.paths import Coeffs, Pair, Path, coeffs_at
from diffjax.process.precond import Meaning
from diffjax.shapes import Keys, OneNumber, Samples

Denoise = Callable[[Array, Array], Pair]
"""`(x[B, …], t[]) -> Pair`: a `Predict` with its conditioning bound; of a flow map with `t[2]`."""


@register_dataclass
@dataclass(frozen=True)
class End:
    """One end of an interval, with the path's coefficients there.

    Attributes:
        t: the time, `[]`.
        a: the scale of the signal, `[]`.
        s: the scale of the noise, `[]`.
    """

    t: OneNumber
    a: OneNumber
    s: OneNumber

    @property
    def half_log_snr(self) -> OneNumber:
        """`ℓ = log(a/s)`, half of the log-SNR λ; minus infinity in pure noise."""
        return jnp.log(self.a) - jnp.log(self.s)

    def mix(self, pair: Pair) -> Samples:
        """`a·x0 + s·eps`: a prediction at the noise level of this end, `[B, …]`."""
        return self.a * pair.x0 + self.s * pair.eps


@register_dataclass
@dataclass(frozen=True)
class Interval:
    """One interval of a grid, which a solver crosses in one step.

    Coefficients are computed when they are read; read each end once.

    Attributes:
        path: the path that the model was trained on.
        t: the time at its beginning, `[]`.
        t_next: the time at its end, `[]`; below `t` on the way to the data.
        keys: `[B]`, one for each sample, for the noise of this step alone.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> interval = Interval(Linear(), jnp.array(0.75), jnp.array(0.5), jnp.zeros(0))
        >>> interval.end.a.item(), round(interval.begin.half_log_snr.item(), 4)
        (0.5, -1.0986)
    """

    path: Path
    t: OneNumber
    t_next: OneNumber
    keys: Array

    @property
    def dt(self) -> OneNumber:
        """`t' - t`, below 0 on the way to the data."""
        return self.t_next - self.t

    @property
    def begin(self) -> End:
        """The coefficients at `t`."""
        return _end(self.path, self.t)

    @property
    def end(self) -> End:
        """The coefficients at `t'`."""
        return _end(self.path, self.t_next)

    def at(self, t: OneNumber) -> End:
        """The coefficients at any other time."""
        return _end(self.path, t)

    @property
    def coeffs(self) -> Coeffs:
        """The coefficients at `t` with their time derivatives, `[]` each."""
        return coeffs_at(self.path, self.t)


def _end(path: Path, t: OneNumber) -> End:
    return End(t, path.alpha(t), path.sigma(t))


class Step(Protocol):
    """One step of a solver, over one interval of the grid."""

    def __call__(
        self, denoise: Denoise, interval: Interval, memory: Any, x: Samples
    ) -> tuple[Samples, Any]:
        """From `x[B, …]` at the beginning of the interval to its end, with the new memory."""
        ...


def _all_times(path: Path, times: Array) -> Array:
    del path
    return times


class Solver(NamedTuple):
    """A solver: its step, its order and its cost.

    Attributes:
        init: `x -> memory`, the initial memory of a multistep solver; `()` for other solvers.
        step: the step over one interval.
        nfe: evaluations of the denoiser per step. None if it depends on the model; then the memory
            is the number of evaluations so far.
        order: the order of convergence: the error falls as `n^-order` with n steps from any time
            inside the path, with first steps that have no earlier evaluations. For solvers with
            fresh noise it is the weak order.
        fresh_noise: whether it adds noise in its steps; then eps must be independent of x0.
        learned_variance: whether it needs a network that also predicts the variance of a step.
        renoises: whether a step depends on `x` only through the prediction.
        needs: the meaning that the model's prediction must have. With `AVERAGE_VELOCITY`, the model
            is evaluated on the two times of each interval.
        route: the times that the solver visits, from those of a grid. Over intervals where time
            rises, noise is added without evaluating the denoiser.
        steps: the number of steps before the last one, from the number of intervals of a grid
            before its last one. They differ if the route is longer or steps are repeated.
        finishes: whether the last interval ends in the predicted x0; otherwise it is a step like
            the others (`unfinished`).
    """

    init: Callable[[Array], Any]
    step: Step
    nfe: int | None
    order: int
    fresh_noise: bool = False
    learned_variance: bool = False
    renoises: bool = False
    needs: Meaning = Meaning.POSTERIOR_MEAN
    route: Callable[[Path, Array], Array] = _all_times
    steps: Callable[[int], int] = int
    finishes: bool = True

    def __repr__(self) -> str:
        name = getattr(self.step, "__qualname__", type(self.step).__name__).partition(".")[0]
        name = self.step.__module__.rpartition(".")[2] if name.startswith("_") else name
        return f"Solver({name}, order {self.order}, {self.nfe or 'any'} evaluations per step)"


P = ParamSpec("P")


def same_for_equal(make: Callable[P, Solver]) -> Callable[P, Solver]:
    """Returns the same solver for equal arguments, so that its compiled programs are reused."""
    kept = functools.cache(make)

    @functools.wraps(make)
    def solver(*args: P.args, **kwargs: P.kwargs) -> Solver:
        try:
            hash((*args, *kwargs.values()))
        except TypeError:  # an array, for example
            return make(*args, **kwargs)
        return kept(*args, **kwargs)

    return solver


def no_memory(x: Array) -> tuple[()]:
    """The memory of a solver that uses no earlier evaluations."""
    del x
    return ()


@same_for_equal
def ddim(eta: Probability[float] = 0.0) -> Solver:
    """DDIM: adds noise to the predicted x0 up to the next level; a part of the noise may be fresh.

        x' = a'·x0 + √(s'² - ρ²)·eps + ρ·z,    ρ = eta·s'·√(1 - q²)

    Deterministic at `eta = 0`, where it is Euler's step in σ. At `eta = 1` ρ is the standard
    deviation of the posterior, and it is DDPM's ancestral step with the smaller variance. Song et
    al. 2021 (arXiv:2010.02502), equation 12.

    Args:
        eta: the amount of fresh noise, from 0 (none) to 1 (DDPM); 0 is usual with few steps.
    """
    return _renoised(eta, lambda pair: 0.0)


@same_for_equal
def ddpm(share: Probability[float] = 0.0) -> Solver:
    """DDPM's ancestral sampling: the posterior `q(x' | x, x0)` with the predicted x0.

    The variance of the noise is `small^(1 - share)·large^share`. At 0 it is that of the posterior,
    `small = s'²·(1 - q²)`, and at 1 that of the forward step, `large = s²·(1 - q²)`. Ho et al. 2020
    (arXiv:2006.11239), equations 6 and 7 and section 3.2.

    Args:
        share: from 0 to 1. With a thousand steps it hardly matters; with few steps 0 is better.
    """
    return _renoised(1.0, lambda pair: share)


@same_for_equal
def ddpm_learned() -> Solver:
    """DDPM's ancestral sampling with the variance that the network predicts, as `ddpm`'s share.

    For runs with the wrapper `learned_variance`. Nichol & Dhariwal 2021 (arXiv:2102.09672),
    equation 15.

    Raises:
        UserError: at the first step, if the model predicts no variance.
    """

    def share(pair: Pair) -> Array:
        if pair.share is None:
            raise UserError("this model predicts no variance: use the solver ddpm")
        return pair.share

    return _renoised(1.0, share)._replace(learned_variance=True)


def _renoised(eta: float, share: Callable[[Pair], Array | float]) -> Solver:
    """DDIM's step, with fresh noise that is `(s/s')^share` times as large."""

    def step(denoise: Denoise, interval: Interval, memory: Any, x: Samples) -> tuple[Samples, Any]:
        begin, end = interval.begin, interval.end
        pair = denoise(x, interval.t)
        # The share of the variance s'² that is fresh.
        gone = eta**2 * jnp.maximum(1.0 - sigma_ratio(begin, end) ** 2, 0.0)
        mean = end.a * pair.x0 + end.s * jnp.sqrt(1.0 - gone) * pair.eps
        if not eta:
            return mean, memory
        fresh = end.s * jnp.sqrt(gone) * (begin.s / end.s) ** share(pair)
        return mean + fresh * normal(interval.keys, x.shape[1:]), memory

    return Solver(no_memory, step, nfe=1, order=1, fresh_noise=bool(eta), renoises=True)


@same_for_equal
def unfinished(solver: Solver) -> Solver:
    """Another solver whose last step ends at the path's `t_min`: some noise stays in the samples.

    DDIM and PNDM of diffusers do this with `set_alpha_to_one=False`, Stable Diffusion's default:
    the last step ends at the first step of the table, where s is 0.029, and not at clean data.

    Args:
        solver: the other one.
    """

    def route(path: Path, times: Array) -> Array:
        times = solver.route(path, times)
        return times.at[-1].set(jnp.asarray(path.t_min, times.dtype))

    return solver._replace(route=route, finishes=False)


@same_for_equal
def flow_map() -> Solver:
    """Steps with the average velocity u of a flow-map model, in any number of steps from one on.

        x' = x + (t' - t)·u(x, t, t')

    With the exact u it is exact for every grid. For runs with `loss=mean_flow`. Geng et al. 2025
    (arXiv:2505.13447), equation 12.
    """

    def step(denoise: Denoise, interval: Interval, memory: Any, x: Samples) -> tuple[Samples, Any]:
        # The prediction is that of the chord, which passes through x'.
        pair = denoise(x, jnp.stack([interval.t, interval.t_next]))
        return interval.end.mix(pair), memory

    return Solver(no_memory, step, nfe=1, order=1, renoises=True, needs=Meaning.AVERAGE_VELOCITY)


@same_for_equal
def euler() -> Solver:
    """Euler's step `x' = x + (t' - t)·v` along the velocity, in the path's own time."""

    def step(denoise: Denoise, interval: Interval, memory: Any, x: Samples) -> tuple[Samples, Any]:
        return x + interval.dt * velocity(denoise, interval.path, x, interval.t), memory

    return Solver(no_memory, step, nfe=1, order=1)


@same_for_equal
def heun() -> Solver:
    """Heun's second-order step: the mean of the velocities at both ends.

        x' = x + ½·(t' - t)·(v(x, t) + v(x + (t' - t)·v(x, t), t'))

    Karras et al. 2022 (arXiv:2206.00364), algorithm 1, in the path's own time.
    """

    def step(denoise: Denoise, interval: Interval, memory: Any, x: Samples) -> tuple[Samples, Any]:
        path, dt = interval.path, interval.dt
        first = velocity(denoise, path, x, interval.t)
        second = velocity(denoise, path, x + dt * first, interval.t_next)
        return x + 0.5 * dt * (first + second), memory

    return Solver(no_memory, step, nfe=2, order=2)


def sigma_ratio(begin: End, end: End) -> OneNumber:
    """`q = σ'/σ = (a·s')/(s·a')`, `[]`; 0 from pure noise."""
    return (begin.a * end.s) / (begin.s * end.a)


def velocity_of(c: Coeffs, pair: Pair) -> Samples:
    """The velocity of the probability flow that a prediction means, `ȧ·x0 + ṡ·eps`, `[B, …]`."""
    return c.da * pair.x0 + c.ds * pair.eps


def velocity(denoise: Denoise, path: Path, x: Samples, t: OneNumber) -> Samples:
    """The velocity of the probability flow at `x[B, …]` and `t[]`, by one evaluation."""
    c = coeffs_at(path, t)
    return velocity_of(c, denoise(x, t))


def normal(keys: Keys, shape: tuple[int, ...]) -> Samples:
    """Standard normal noise, `[B, *shape]`, each row from its own key.

    So the noise of a sample depends on its own key alone, not on the other samples of its batch.
    """
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
