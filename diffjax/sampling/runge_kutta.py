"""Runge–Kutta solvers of the probability flow `dx/dt = v`: they use no earlier evaluations."""

from dataclasses import replace
from typing import Annotated

import jax.numpy as jnp

from diffjax import kinds
from diffjax.kinds import Limit, NotNegative, Positive
from diffjax.process.paths import Path, time_of_log_snr
from diffjax.sampling import solvers
from diffjax.sampling.solvers import (
    Denoise,
    Interval,
    Solver,
    no_memory,
    same_for_equal,
    velocity,
)
from diffjax.shapes import OneNumber, Samples

Churn = Annotated[float, kinds.Range("[0, 0.4143]")]


@same_for_equal
def two_stage(alpha: Positive[float] = 0.5) -> Solver:
    """The second-order methods of two evaluations, at `t` and at `t + alpha·(t' - t)`.

        x' = x + (t' - t)·((1 - 1/(2·alpha))·v_1 + 1/(2·alpha)·v_2)

    in the path's own time. Karras et al. 2022 (arXiv:2206.00364), appendix D.3.

    Args:
        alpha: where the second evaluation is, as a share of the step: 1/2 is the midpoint rule,
            2/3 Ralston's method, 1 Heun's.
    """

    def step(
        denoise: Denoise, interval: Interval, memory: tuple, x: Samples
    ) -> tuple[Samples, tuple]:
        path, t, dt = interval.path, interval.t, interval.dt
        first = velocity(denoise, path, x, t)
        second = velocity(denoise, path, x + alpha * dt * first, t + alpha * dt)
        late = 0.5 / alpha
        return x + dt * ((1.0 - late) * first + late * second), memory

    return Solver(no_memory, step, nfe=2, order=2)


@same_for_equal
def midpoint() -> Solver:
    """The midpoint rule in the path's own time."""
    return two_stage(0.5)


@same_for_equal
def rk4() -> Solver:
    """The classical fourth-order method in the path's own time. Kutta 1901."""

    def step(
        denoise: Denoise, interval: Interval, memory: tuple, x: Samples
    ) -> tuple[Samples, tuple]:
        path, t, dt = interval.path, interval.t, interval.dt
        v1 = velocity(denoise, path, x, t)
        v2 = velocity(denoise, path, x + 0.5 * dt * v1, t + 0.5 * dt)
        v3 = velocity(denoise, path, x + 0.5 * dt * v2, t + 0.5 * dt)
        v4 = velocity(denoise, path, x + dt * v3, interval.t_next)
        return x + dt / 6.0 * (v1 + 2.0 * v2 + 2.0 * v3 + v4), memory

    return Solver(no_memory, step, nfe=4, order=4)


@same_for_equal
def edm_heun(
    churn: Churn = 0.0,
    low: NotNegative[float] = 0.0,
    high: Limit[float] = jnp.inf,
    noise: NotNegative[float] = 1.0,
) -> Solver:
    """EDM's sampler: more noise by `churn`, then Heun's step in `σ = s/a`.

    In `y = x/a` the flow is `dy = eps dσ`. First `σ̂ = (1 + churn)·σ` with fresh noise to match,
    then the mean of eps at `σ̂` and at `σ'`. From pure noise (σ infinite) the step is DDIM's.
    Karras et al. 2022 (arXiv:2206.00364), algorithm 2.

    Args:
        churn: the paper's `γ = S_churn/N`, at most `√2 - 1`; 0 is deterministic, and of order 2.
        low: the paper's `S_tmin`, the smallest σ at which noise is added; 0.01 to 0.05 there.
        high: `S_tmax`, the largest; 1 to 50 there.
        noise: `S_noise`, the standard deviation of the fresh noise; slightly above 1 (1.003 to
            1.007 in the paper) makes up for detail that the denoiser removes.
    """

    def step(
        denoise: Denoise, interval: Interval, memory: tuple, x: Samples
    ) -> tuple[Samples, tuple]:
        if churn:
            x, interval = churned(interval, x)
        begin, end = interval.begin, interval.end
        first = denoise(x, interval.t)
        straight = end.mix(first)
        second = denoise(straight, interval.t_next)
        span = end.a * (end.s / end.a - begin.s / begin.a)
        span = jnp.where(jnp.isfinite(span), span, 0.0)
        return straight + 0.5 * span * (second.eps - first.eps), memory

    def churned(interval: Interval, x: Samples) -> tuple[Samples, Interval]:
        path, t = interval.path, interval.t
        sigma = _sigma(path, t)
        raised = jnp.minimum((1.0 + churn) * sigma, _sigma(path, jnp.asarray(path.t_noise)))
        applies = (sigma >= low) & (sigma <= high) & (raised > sigma)
        up = jnp.where(applies, time_of_log_snr(path, -2.0 * jnp.log(raised)), t)
        # The time is known to float32's resolution; the noise follows the time.
        fresh = noise * jnp.sqrt(jnp.maximum(_sigma(path, up) ** 2 - sigma**2, 0.0))
        z = solvers.normal(interval.keys, x.shape[1:])
        x = jnp.where(applies, path.alpha(up) * (x / path.alpha(t) + fresh * z), x)
        return x, replace(interval, t=up)

    return Solver(no_memory, step, nfe=2, order=1 if churn else 2, fresh_noise=bool(churn))


def _sigma(path: Path, t: OneNumber) -> OneNumber:
    return path.sigma(t) / path.alpha(t)
