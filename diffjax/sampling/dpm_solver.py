"""DPM-Solver++: x0 as a Taylor series in log-SNR, and the two steps that use it.

`h` is the step in `λ = log(a/s)` and `q = e^{-h} = σ'/σ`. In pure noise (`a = 0`) `h` is infinite;
the step from there is DDIM's, and evaluations there are not looked back at. Lu et al. 2022
(arXiv:2211.01095).
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from diffjax.kinds import Interval, NotNegative
from diffjax.process.paths import Path, time_of_log_snr
from diffjax.sampling import solvers
from diffjax.sampling.adams import Ends, ends_of
from diffjax.sampling.solvers import Denoise, Solver, same_for_equal
from diffjax.shapes import OneNumber, Samples


@same_for_equal
def dpmpp_multistep(
    order: Annotated[int, Interval("[2, 3]")] = 2, eta: NotNegative[float] = 0.0
) -> Solver:
    """DPM-Solver++ 2M and 3M, and with `eta` above 0 their SDE forms.

    `x' = (s'/s)·q^η·x + a'·(1 - q^{1+η})·(x0 + D) + s'·√(1 - q^{2η})·z`, where D corrects for how
    x0 has changed since the last steps. `eta = 1` is SDE-DPM-Solver++.

    The third-order form is as published and in all of its implementations, with half the second
    difference that a series of third order has: its measured order is 2 (docs/solvers.md);
    `adams.exp_ab(3)` is of third order at the same cost. Lu et al. 2022 (arXiv:2211.01095).

    Args:
        order: 2 or 3; the first steps, with less to look back at, are of lower order.
        eta: 0 is the ODE, 1 adds noise as fast as DDPM.
    """

    def init(x: Array) -> tuple[Array, Array]:
        return jnp.full(order - 1, -jnp.inf), jnp.zeros((order - 1, *x.shape), x.dtype)

    def step(
        denoise: Denoise,
        path: Path,
        memory: tuple[Array, Array],
        x: Samples,
        t: OneNumber,
        t_next: OneNumber,
        keys: Array,
    ) -> tuple[Samples, tuple[Array, Array]]:
        e = ends_of(path, t, t_next)
        x0 = denoise(x, t).x0
        lambdas, values = memory
        here, h, q = _half_log_snr(e.a, e.s), _step_size(e), _ratio(e)
        gain = e.a_next * (1.0 - q ** (1.0 + eta))
        x_next = e.s_next / e.s * q**eta * x + gain * x0
        known = jnp.isfinite(lambdas) & jnp.isfinite(here)
        # First differences, scaled to this step: h·(x0 - x0')/(λ - λ').
        last = _difference(known[0], here - lambdas[0], h, x0 - values[0])
        correction = 0.5 * gain * last
        if order == 3:
            before = _difference(known[1], lambdas[0] - lambdas[1], h, values[0] - values[1])
            span = jnp.where(known[1], here - lambdas[1], 1.0)
            second = h / span * (last - before)
            slope = last + (here - lambdas[0]) / span * (last - before)
            scaled = (1.0 + eta) * h
            phi_2 = (q ** (1.0 + eta) - 1.0) / scaled + 1.0
            third = e.a_next * (phi_2 * slope - (phi_2 / scaled - 0.5) * second)
            correction = jnp.where(known[1], third, correction)
        x_next = x_next + jnp.where(known[0], correction, 0.0)
        if eta:
            z = solvers.normal(keys, x.shape[1:])
            x_next = x_next + e.s_next * jnp.sqrt(1.0 - q ** (2.0 * eta)) * z
        lambdas = jnp.concatenate([here[None], lambdas])[: order - 1]
        return x_next, (lambdas, jnp.concatenate([x0[None], values])[: order - 1])

    return Solver(init, step, nfe=1, order=2, fresh_noise=bool(eta))


@same_for_equal
def dpmpp_2s() -> Solver:
    """DPM-Solver++ 2S: x0 is asked again half-way in log-SNR, and taken for the whole step.

    Lu et al. 2022 (arXiv:2211.01095), algorithm 1 with `r = 1/2`.
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
        here, there = _half_log_snr(*_at(path, t)), _half_log_snr(*_at(path, t_next))
        # Half-way from pure noise is nowhere: there both evaluations are at its end.
        middle = jnp.where(jnp.isfinite(here), 0.5 * (here + there), there)
        t_middle = jnp.clip(time_of_log_snr(path, 2.0 * middle), t_next, t)
        first = denoise(x, t).x0
        second = denoise(_towards(ends_of(path, t, t_middle), x, first), t_middle).x0
        return _towards(ends_of(path, t, t_next), x, second), memory

    return Solver(lambda x: (), step, nfe=2, order=2)


def _towards(e: Ends, x: Array, x0: Array) -> Array:
    return e.s_next / e.s * x + (e.a_next - e.a * e.s_next / e.s) * x0


def _at(path: Path, t: Array) -> tuple[Array, Array]:
    return path.alpha(t), path.sigma(t)


def _half_log_snr(a: Array, s: Array) -> Array:
    return jnp.log(a) - jnp.log(s)


def _ratio(e: Ends) -> Array:
    return (e.a * e.s_next) / (e.s * e.a_next)


def _step_size(e: Ends) -> Array:
    return _half_log_snr(e.a_next, e.s_next) - _half_log_snr(e.a, e.s)


def _difference(known: Array, gap: Array, h: Array, change: Array) -> Array:
    return jnp.where(known, h, 0.0) / jnp.where(known, gap, 1.0) * change
