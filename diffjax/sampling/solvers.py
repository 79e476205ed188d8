"""Solvers walk from noise to data; they see `(x0, eps)` and never how it was predicted.

A solver is a pair of functions. It asks the denoiser itself and says how often per step, so cost
is counted, not guessed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from diffjax.errors import UserError
from diffjax.kinds import Probability
from diffjax.process.paths import Pair, Path, coeffs
from diffjax.process.precond import Meaning
from diffjax.shapes import Keys, OneNumber, Samples

Denoise = Callable[[Array, Array], Pair]
"""`(x[B, …], t[]) -> Pair`: a `Predict` with its conditioning bound; of a flow map with `t[2]`."""


class Step(Protocol):
    """One interval of the grid."""

    def __call__(
        self,
        denoise: Denoise,
        path: Path,
        memory: Any,
        x: Samples,
        t: OneNumber,
        t_next: OneNumber,
        keys: Array,
    ) -> tuple[Samples, Any]:
        """From `x[B, …]` at `t[]` to `t_next[]`; `keys[B]` are for this step alone."""
        ...


def _all_times(path: Path, times: Array) -> Array:
    del path
    return times


class Solver(NamedTuple):
    """A way to take the steps.

    Attributes:
        init: `x -> memory`, what multistep solvers carry along; `()` for the others.
        step: one interval.
        nfe: calls of the denoiser per step; None where that depends on the model, and the memory
            is their number so far.
        order: its error falls as `n^-order` from anywhere inside the path on, first steps with
            nothing to look back at included; the weak order of those with fresh noise.
        fresh_noise: whether it adds noise on the way, for which eps has to be independent of x0.
        learned_variance: whether it needs a network that predicts the variance of a step as well.
        renoises: whether `x` enters a step through the prediction alone.
        needs: what the model's prediction has to be; with `AVERAGE_VELOCITY`, the model is
            evaluated on the two times of each interval.
        route: the times that it walks, from those of a grid; where they rise the denoiser is not
            asked.
        steps: how many falling intervals its route has before the last one, of so many of a grid.
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


P = ParamSpec("P")


def same_for_equal(make: Callable[P, Solver]) -> Callable[P, Solver]:
    """Makes equal arguments give the same solver, so that its compiled programs are found again."""
    kept = functools.cache(make)

    @functools.wraps(make)
    def solver(*args: P.args, **kwargs: P.kwargs) -> Solver:
        try:
            hash((*args, *kwargs.values()))
        except TypeError:  # an array, say
            return make(*args, **kwargs)
        return kept(*args, **kwargs)

    return solver


def _no_memory(x: Array) -> tuple[()]:
    del x
    return ()


@same_for_equal
def ddim(eta: Probability[float] = 0.0) -> Solver:
    """DDIM: re-noise the predicted x0 to the next level, with `eta` of the noise fresh.

    `x' = a'·x0 + √(s'² - ρ²)·eps + ρ·z` with `ρ = eta·s'·√(1 - SNR/SNR')`: the posterior's
    deviation at `eta = 1`, where it is DDPM's ancestral step with the smaller variance;
    deterministic at `eta = 0`, where it is Euler's step in `s/a`. Song et al. 2021
    (arXiv:2010.02502), equation 12.
    """
    return _renoised(eta, lambda pair: 0.0)


@same_for_equal
def ddpm(share: Probability[float] = 0.0) -> Solver:
    """DDPM's ancestral sampling: the mean of `q(x' | x, x0)` with x0 as predicted, and noise.

    The noise's variance is `small^(1 - share)·large^share`: the posterior's own, `s'²·(1 - q²)`
    with `q = σ'/σ`, at 0, and that of the forward step, `s²·(1 - q²)`, at 1. Ho et al. 2020
    (arXiv:2006.11239), equations 6 and 7 and section 3.2.
    """
    return _renoised(1.0, lambda pair: share)


@same_for_equal
def ddpm_learned() -> Solver:
    """DDPM's ancestral sampling with the variance that the network learned, as `ddpm`'s share.

    For runs with the wrapper `learned_variance`. Nichol & Dhariwal 2021 (arXiv:2102.09672),
    equation 15.
    """

    def share(pair: Pair) -> Array:
        if pair.share is None:
            raise UserError("this model predicts no variance: take the solver ddpm")
        return pair.share

    return _renoised(1.0, share)._replace(learned_variance=True)


def _renoised(eta: float, share: Callable[[Pair], Array | float]) -> Solver:
    """DDIM's step, whose fresh noise is `(s/s')^share` times as large."""

    def step(
        denoise: Denoise,
        path: Path,
        memory: Any,
        x: Samples,
        t: OneNumber,
        t_next: OneNumber,
        keys: Array,
    ) -> tuple[Samples, Any]:
        here, there = (coeffs(path, time[None], x.ndim) for time in (t, t_next))
        pair = denoise(x, t)
        ratio = (here.a * there.s) / (here.s * there.a)
        gone = eta**2 * jnp.maximum(1.0 - ratio**2, 0.0)  # of the variance s'²
        mean = there.a * pair.x0 + there.s * jnp.sqrt(1.0 - gone) * pair.eps
        if not eta:
            return mean, memory
        fresh = there.s * jnp.sqrt(gone) * (here.s / there.s) ** share(pair)
        return mean + fresh * normal(keys, x.shape[1:]), memory

    return Solver(_no_memory, step, nfe=1, order=1, fresh_noise=bool(eta), renoises=True)


@same_for_equal
def flow_map() -> Solver:
    """Where a model of the flow map says that the flow goes: any number of steps, one too.

    `x' = x + (t' - t)·u(x, t, t')` with the average velocity u: exact for the exact u, whatever the
    steps. For runs with `loss=mean_flow`. Geng et al. 2025 (arXiv:2505.13447), equation 12.
    """

    def step(
        denoise: Denoise,
        path: Path,
        memory: Any,
        x: Samples,
        t: OneNumber,
        t_next: OneNumber,
        keys: Array,
    ) -> tuple[Samples, Any]:
        del keys
        pair = denoise(x, jnp.stack([t, t_next]))
        there = coeffs(path, t_next[None], x.ndim)
        return there.a * pair.x0 + there.s * pair.eps, memory

    return Solver(_no_memory, step, nfe=1, order=1, renoises=True, needs=Meaning.AVERAGE_VELOCITY)


@same_for_equal
def euler() -> Solver:
    """Euler's step along the velocity `a'·x0 + s'·eps` in the path's own time."""

    def step(
        denoise: Denoise,
        path: Path,
        memory: Any,
        x: Samples,
        t: OneNumber,
        t_next: OneNumber,
        keys: Array,
    ) -> tuple[Samples, Any]:
        del keys
        return x + (t_next - t) * velocity(denoise, path, x, t), memory

    return Solver(_no_memory, step, nfe=1, order=1)


@same_for_equal
def heun() -> Solver:
    """Heun's second-order step: the mean of the velocities at both ends.

    Karras et al. 2022 (arXiv:2206.00364), algorithm 1, in the path's own time.
    """

    def step(
        denoise: Denoise,
        path: Path,
        memory: Any,
        x: Samples,
        t: OneNumber,
        t_next: OneNumber,
        keys: Array,
    ) -> tuple[Samples, Any]:
        del keys
        first = velocity(denoise, path, x, t)
        second = velocity(denoise, path, x + (t_next - t) * first, t_next)
        return x + 0.5 * (t_next - t) * (first + second), memory

    return Solver(_no_memory, step, nfe=2, order=2)


def velocity(denoise: Denoise, path: Path, x: Samples, t: OneNumber) -> Samples:
    """The velocity of the probability flow, `a'·x0 + s'·eps`, `[B, …]`."""
    c = coeffs(path, t[None], x.ndim)
    pair = denoise(x, t)
    return c.da * pair.x0 + c.ds * pair.eps


def normal(keys: Keys, shape: tuple[int, ...]) -> Samples:
    """Standard normal noise, `[B, *shape]`, each row from its own key.

    So a sample's noise depends on its own key alone, not on the batch that it is drawn in.
    """
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
