"""Sampling with a model of the end of the flow: jump to the end, add noise again, and repeat."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from diffjax.kinds import Positive, Probability
from diffjax.process.paths import Pair, Path
from diffjax.process.precond import Meaning
from diffjax.sampling import solvers
from diffjax.sampling.solvers import (
    Denoise,
    Interval,
    Solver,
    no_memory,
    same_for_equal,
    sigma_ratio,
)
from diffjax.shapes import OneNumber, Samples


@same_for_equal
def consistency() -> Solver:
    """Multistep consistency sampling: `x' = a'·f(x, t) + s'·z` with fresh noise `z ~ N(0, I)`.

    `f(x, t)` is the end of the flow from `x`, so one step is a sample, and more steps correct it.
    For objectives whose prediction is the end of the flow: with a posterior mean in the place of
    `f`, samples have too little variance. Song et al. 2023 (arXiv:2303.01469), algorithm 1.
    """

    def step(denoise: Denoise, interval: Interval, memory: Any, x: Samples) -> tuple[Samples, Any]:
        end, noise = interval.end, solvers.normal(interval.keys, x.shape[1:])
        return end.mix(Pair(denoise(x, interval.t).x0, noise)), memory

    return Solver(no_memory, step, nfe=1, order=1, fresh_noise=True, needs=Meaning.END_OF_FLOW)


def _ends(path: Path, times: Array) -> Array:
    del path
    return times[jnp.array([0, -1])]


def _none(num_steps: int) -> int:
    del num_steps
    return 0


@same_for_equal
def one_step() -> Solver:
    """The jump from pure noise to a sample, in one evaluation for any grid.

    For generators, whose network is trained at pure noise alone (`objective=drifting`).
    """

    def step(denoise: Denoise, interval: Interval, memory: Any, x: Samples) -> tuple[Samples, Any]:
        return interval.end.mix(denoise(x, interval.t)), memory

    return Solver(
        no_memory, step, nfe=1, order=1, needs=Meaning.END_OF_FLOW, route=_ends, steps=_none
    )


@same_for_equal
def trajectory_consistency(
    gamma: Probability[float] = 0.3, num_train_steps: Positive[int] = 1000
) -> Solver:
    """TCD's sampling: jumps along the flow beyond the next time, and adds the noise of the rest.

        x_r = a_r·x0 + s_r·eps,    r = (1 - gamma)·t'
        x' = (a'/a_r)·x_r + √(s'² - (a'/a_r)²·s_r²)·z

    At gamma = 0 it is DDIM, and at 1 all but `consistency`. The time r is a step of the table, at
    or below the product. Zheng et al. 2024 (arXiv:2402.19159), algorithm 4.

    Args:
        gamma: how far a jump goes beyond the next time, from 0 to 1. 0.3 in the paper, larger for
            more steps; `eta` in diffusers.
        num_train_steps: the steps of the table; 1,000 for Stable Diffusion.
    """

    def step(denoise: Denoise, interval: Interval, memory: Any, x: Samples) -> tuple[Samples, Any]:
        pair, end = denoise(x, interval.t), interval.end
        beyond = interval.at(_beyond(interval.t_next))
        # Exactly 0 where the jump goes no further than the step.
        gone = jnp.maximum(1.0 - sigma_ratio(end, beyond) ** 2, 0.0)
        noise = solvers.normal(interval.keys, x.shape[1:])
        return end.a / beyond.a * beyond.mix(pair) + end.s * jnp.sqrt(gone) * noise, memory

    def _beyond(t: OneNumber) -> OneNumber:
        step = jnp.round(num_train_steps * t) - 1.0
        return (1.0 + jnp.floor((1.0 - gamma) * step)) / num_train_steps

    return Solver(no_memory, step, nfe=1, order=1, fresh_noise=True, needs=Meaning.END_OF_FLOW)
