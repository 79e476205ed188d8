"""DPM-Solver++: x0 as a Taylor series in the half-log-SNR ℓ, and two solvers that use it.

From pure noise (`a = 0`) the step `h` in ℓ is infinite. There the step is DDIM's, and the
evaluation is not used later. Lu et al. 2022 (arXiv:2211.01095).
"""

from dataclasses import replace
from typing import Annotated

import jax.numpy as jnp
from jax import Array

from diffjax import kinds
from diffjax.kinds import NotNegative
from diffjax.process.paths import time_of_log_snr
from diffjax.sampling import solvers
from diffjax.sampling.solvers import (
    Denoise,
    Interval,
    Solver,
    no_memory,
    same_for_equal,
    sigma_ratio,
)
from diffjax.shapes import Samples


@same_for_equal
def dpmpp_multistep(
    order: Annotated[int, kinds.Range("[2, 3]")] = 2, eta: NotNegative[float] = 0.0
) -> Solver:
    """DPM-Solver++ 2M and 3M, and with `eta` above 0 their SDE forms.

        x' = (s'/s)·q^η·x + a'·(1 - q^{1+η})·(x0 + D) + s'·√(1 - q^{2η})·z

    where D extrapolates the change of x0 over the last steps. `eta = 1` is SDE-DPM-Solver++.

    The third-order form is as published and in all of its implementations, with half of the second
    difference that a series of third order has: its measured order is 2 (docs/solvers.md).
    `adams.exp_ab(3)` is of third order at the same cost. Lu et al. 2022 (arXiv:2211.01095).

    Args:
        order: 2 or 3; the first steps, with fewer earlier evaluations, are of lower order.
        eta: 0 is the ODE, 1 adds noise as fast as DDPM.
    """

    def init(x: Array) -> tuple[Array, Array]:
        return jnp.full(order - 1, -jnp.inf), jnp.zeros((order - 1, *x.shape), x.dtype)

    def step(
        denoise: Denoise, interval: Interval, memory: tuple[Array, Array], x: Samples
    ) -> tuple[Samples, tuple[Array, Array]]:
        begin, end = interval.begin, interval.end
        q = sigma_ratio(begin, end)
        x0 = denoise(x, interval.t).x0
        past, values = memory
        here = begin.half_log_snr
        h = end.half_log_snr - here
        gain = end.a * (1.0 - q ** (1.0 + eta))
        x_next = end.s / begin.s * q**eta * x + gain * x0
        known = jnp.isfinite(past) & jnp.isfinite(here)
        # First differences, scaled to this step: h·(x0 - x0')/(ℓ - ℓ').
        last = _difference(known[0], here - past[0], h, x0 - values[0])
        correction = 0.5 * gain * last
        if order == 3:
            before = _difference(known[1], past[0] - past[1], h, values[0] - values[1])
            span = jnp.where(known[1], here - past[1], 1.0)
            second = h / span * (last - before)
            slope = last + (here - past[0]) / span * (last - before)
            scaled = (1.0 + eta) * h
            phi_2 = (q ** (1.0 + eta) - 1.0) / scaled + 1.0
            third = end.a * (phi_2 * slope - (phi_2 / scaled - 0.5) * second)
            correction = jnp.where(known[1], third, correction)
        x_next = x_next + jnp.where(known[0], correction, 0.0)
        if eta:
            z = solvers.normal(interval.keys, x.shape[1:])
            x_next = x_next + end.s * jnp.sqrt(1.0 - q ** (2.0 * eta)) * z
        past = jnp.concatenate([here[None], past])[: order - 1]
        return x_next, (past, jnp.concatenate([x0[None], values])[: order - 1])

    return Solver(init, step, nfe=1, order=2, fresh_noise=bool(eta))


@same_for_equal
def dpmpp_2s() -> Solver:
    """DPM-Solver++ 2S: x0 is evaluated again half-way in ℓ, and used for the whole step.

    Lu et al. 2022 (arXiv:2211.01095), algorithm 1 with `r = 1/2`.
    """

    def step(
        denoise: Denoise, interval: Interval, memory: tuple, x: Samples
    ) -> tuple[Samples, tuple]:
        here, there = interval.begin.half_log_snr, interval.end.half_log_snr
        # There is no middle of a step from pure noise: both evaluations are at its end then.
        middle = jnp.where(jnp.isfinite(here), 0.5 * (here + there), there)
        t_middle = time_of_log_snr(interval.path, 2.0 * middle)
        t_middle = jnp.clip(t_middle, interval.t_next, interval.t)
        first = denoise(x, interval.t).x0
        second = denoise(_towards(replace(interval, t_next=t_middle), x, first), t_middle).x0
        return _towards(interval, x, second), memory

    return Solver(no_memory, step, nfe=2, order=2)


def _towards(interval: Interval, x: Array, x0: Array) -> Array:
    begin, end = interval.begin, interval.end
    return end.s / begin.s * x + (end.a - begin.a * end.s / begin.s) * x0


def _difference(known: Array, gap: Array, h: Array, change: Array) -> Array:
    return jnp.where(known, h, 0.0) / jnp.where(known, gap, 1.0) * change
