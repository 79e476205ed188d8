"""Solution flow: its gradient by hand, its times, its schedule, and the exact flow map."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.compiling import once
from diffjax.objectives.base import Progress
from diffjax.objectives.few_step.flow_maps import AlphaFlow
from diffjax.objectives.few_step.solution_flow import SolutionFlow
from diffjax.oracle.verify import verify_objective
from tests.objectives.few_step.test_flow_maps import (
    BATCH,
    GAUSSIAN,
    of,
    smooth_network,
    u_in_numpy,
    with_slope,
)

SOFLOW = of(SolutionFlow, between=0.6)


@once()
def loss_slope_and_parts(objective, params, fraction):
    key = jax.random.key(3)

    def loss(params):
        progress = Progress(fraction, num_steps=1)
        return objective(smooth_network, params, params, key, BATCH, progress)[0]

    time_key, noise_key = jax.random.split(key)
    t, s = objective.intervals(time_key, 32)
    noised = objective.noised(t, noise_key, BATCH)
    velocity = noised.pair.eps - noised.pair.x0
    return *with_slope(loss, params), t, s, noised.x_t, velocity


def test_the_gradient_is_the_difference_quotient_of_solutions():
    with jax.enable_x64(True):
        found = loss_slope_and_parts(SOFLOW, 1.3, 0.5)
    loss, slope, t, s, x, v = jax.device_get(found)
    step = t > s
    assert 8 < step.sum() < 28
    length = np.maximum(np.sqrt(0.1 * 0.002) * (t - s), 1e-4)
    middle = t - np.where(step, length, 0.0)

    def solution(own, x, t):
        return x - (t - s)[:, None] * u_in_numpy(own, x, t, s)

    there = x - (t - middle)[:, None] * v
    quotient = (solution(1.3, x, t) - solution(1.3, there, middle)) / np.where(step, length, 1.0)[
        :, None
    ]
    error = np.where(step[:, None], quotient, v - u_in_numpy(1.3, x, t, t))
    weight = 1.0 / (np.square(error).mean(axis=1) + 0.01)
    by_parameter = (u_in_numpy(1.3 + 1e-6, x, t, s) - u_in_numpy(1.3 - 1e-6, x, t, s)) / 2e-6
    # The authors' surrogate for steps, and twice it for flow matching.
    expected = -np.where(step, 1.0, 2.0) * weight * (error * by_parameter).mean(axis=1)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-8)
    assert (loss >= 0.0).all()


def test_it_is_half_of_alpha_flow_where_all_is_a_step():
    half = of(SolutionFlow, between=1.0, first=0.3, last=0.3, power=0.0)
    alpha = of(AlphaFlow, between=1.0, smallest=0.3, power=0.0)
    with jax.enable_x64(True):
        loss, _, t, s, x, v = jax.device_get(loss_slope_and_parts(half, 1.3, 1.0))
    share = np.asarray(alpha.alpha(jnp.array(1.0)))
    middle = t - share * (t - s)
    there = u_in_numpy(1.3, x - (t - middle)[:, None] * v, middle, s)
    sides = u_in_numpy(1.3, x, t, s) - share * v - (1 - share) * there
    # α-Flow's loss is the sum of squares over α; there are two numbers.
    long = (t - s) > 1e-3
    expected = 0.5 * np.square(sides).mean(axis=1) / share
    np.testing.assert_allclose(loss[long], expected[long], rtol=1e-5)


def test_times_and_shares_are_in_order():
    t, s = jax.jit(SOFLOW.intervals, static_argnums=1)(jax.random.key(0), 20_000)
    t, s = np.asarray(t, np.float64), np.asarray(s, np.float64)
    step = t > s
    assert abs(step.mean() - 0.6) < 0.02
    assert (t[step] - s[step] > 0.9e-4).all()
    assert abs(np.median(t[step]) - 1 / (1 + np.exp(-0.2))) < 0.01
    spans = jnp.array([0.0, 2e-4, 0.5])
    np.testing.assert_allclose(SOFLOW.alpha(jnp.array(0.0), spans), [1.0, 0.5, 0.1], rtol=1e-5)
    np.testing.assert_allclose(SOFLOW.alpha(jnp.array(1.0), spans), [1.0, 0.5, 0.002], rtol=1e-5)


@pytest.mark.thorough
def test_the_exact_average_velocity_is_a_minimum_at_the_end():
    objective = replace(SOFLOW, power=0.0, last=0.01)
    found = verify_objective(objective, GAUSSIAN, num_batches=16, limit=0.3, fraction=1.0)
    assert found.passed, found
