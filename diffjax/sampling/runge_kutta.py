"""Runge–Kutta solvers of the probability flow: they look only at the step they take."""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from diffjax.kinds import Interval, Limit, NotNegative, Positive
from diffjax.process.paths import Path, time_of_log_snr
from diffjax.sampling import solvers
from diffjax.sampling.adams import ends_of
from diffjax.sampling.solvers import Denoise, Solver, same_for_equal, velocity
from diffjax.shapes import OneNumber, Samples

Churn = Annotated[float, Interval("[0, 0.4143]")]


@same_for_equal
def two_stage(alpha: Positive[float] = 0.5) -> Solver:
    """The second-order methods of two evaluations, at `t` and at `t + alpha·(t' - t)`.

    `x' = x + (t' - t)·((1 - 1/(2·alpha))·v_1 + 1/(2·alpha)·v_2)`, in the path's own time: 1/2 is
    the midpoint rule, 2/3 Ralston's, 1 Heun's. Karras et al. 2022 (arXiv:2206.00364), appendix D.3.
    """

    def step(
        denoise: Denoise,
        path: Path,
        memory: tuple,
        x: Samples,
        t: OneNumber,
        t_next: OneNumber,
        keys: Array,
    ) -> tuple[Samples, tuple]:
        del keys
        dt = t_next - t
        first = velocity(denoise, path, x, t)
        second = velocity(denoise, path, x + alpha * dt * first, t + alpha * dt)
        late = 0.5 / alpha
        return x + dt * ((1.0 - late) * first + late * second), memory

    return Solver(lambda x: (), step, nfe=2, order=2)


@same_for_equal
def midpoint() -> Solver:
    """The midpoint rule in the path's own time."""
    return two_stage(0.5)


@same_for_equal
def rk4() -> Solver:
    """The classical fourth-order method in the path's own time. Kutta 1901."""

    def step(
        denoise: Denoise,
        path: Path,
        memory: tuple,
        x: Samples,
        t: OneNumber,
        t_next: OneNumber,
        keys: Array,
    ) -> tuple[Samples, tuple]:
        del keys
        dt = t_next - t
        v1 = velocity(denoise, path, x, t)
        v2 = velocity(denoise, path, x + 0.5 * dt * v1, t + 0.5 * dt)
        v3 = velocity(denoise, path, x + 0.5 * dt * v2, t + 0.5 * dt)
        v4 = velocity(denoise, path, x + dt * v3, t_next)
        return x + dt / 6.0 * (v1 + 2.0 * v2 + 2.0 * v3 + v4), memory

    return Solver(lambda x: (), step, nfe=4, order=4)


@same_for_equal
def edm_heun(
    churn: Churn = 0.0,
    low: NotNegative[float] = 0.0,
    high: Limit[float] = jnp.inf,
    noise: NotNegative[float] = 1.0,
) -> Solver:
    """EDM's sampler: noise up by `churn`, then Heun's step in `σ = s/a`.

    In `y = x/a`, the flow is `dy = eps dσ`: first `σ̂ = (1 + churn)·σ` with fresh noise to match,
    then the mean of eps at `σ̂` and at `σ'`. From pure noise (σ infinite) the step is DDIM's.
    Karras et al. 2022 (arXiv:2206.00364), algorithm 2.

    Args:
        churn: the paper's `γ = S_churn/N`, at most `√2 - 1`; 0 is deterministic, and of order 2.
        low: the paper's `S_tmin`, the least σ at which noise is added.
        high: `S_tmax`, the largest one.
        noise: `S_noise`, the deviation of the fresh noise; slightly above 1 makes up for detail
            that the denoiser takes away.
    """

    def step(
        denoise: Denoise,
        path: Path,
        memory: tuple,
        x: Samples,
        t: OneNumber,
        t_next: OneNumber,
        keys: Array,
    ) -> tuple[Samples, tuple]:
        if churn:
            x, t = _churn(path, x, t, keys)
        e = ends_of(path, t, t_next)
        first = denoise(x, t)
        straight = e.a_next * first.x0 + e.s_next * first.eps
        second = denoise(straight, t_next)
        span = e.a_next * (e.s_next / e.a_next - e.s / e.a)
        span = jnp.where(jnp.isfinite(span), span, 0.0)
        return straight + 0.5 * span * (second.eps - first.eps), memory

    def _churn(path: Path, x: Array, t: Array, keys: Array) -> tuple[Array, Array]:
        a, sigma = path.alpha(t), path.sigma(t) / path.alpha(t)
        end = path.sigma(jnp.asarray(path.t_noise)) / path.alpha(jnp.asarray(path.t_noise))
        raised = jnp.minimum((1.0 + churn) * sigma, end)
        churned = (sigma >= low) & (sigma <= high) & (raised > sigma)
        up = jnp.where(churned, time_of_log_snr(path, -2.0 * jnp.log(raised)), t)
        # The time is known to float32's resolution; the noise follows the time.
        raised = path.sigma(up) / path.alpha(up)
        fresh = noise * jnp.sqrt(jnp.maximum(raised**2 - sigma**2, 0.0))
        z = solvers.normal(keys, x.shape[1:])
        return jnp.where(churned, path.alpha(up) * (x / a + fresh * z), x), up

    return Solver(lambda x: (), step, nfe=2, order=1 if churn else 2, fresh_noise=bool(churn))
