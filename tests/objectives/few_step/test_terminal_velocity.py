"""Terminal velocity matching: its loss by hand, its times, and the exact flow map."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.compiling import once
from diffjax.objectives.base import Progress
from diffjax.objectives.few_step.terminal_velocity import TerminalVelocity
from diffjax.oracle.verify import verify_objective
from diffjax.process import paths, targets, times, weights
from diffjax.process.precond import Precond, TimeLabel
from tests.objectives.few_step.test_flow_maps import (
    BATCH,
    GAUSSIAN,
    smooth_network,
    u_in_numpy,
    with_slope,
)

TVM = TerminalVelocity(
    paths.Linear(),
    Precond(targets.Velocity(), TimeLabel(1.0)),
    weights.Constant(),
    times.LogitNormal(-0.4),
)


def half_without(params, x, noise_label, cond, *, key=None):
    """Without the condition a network of half the size."""
    full = smooth_network(params, x, noise_label, cond)
    return 0.5 * full if cond is None else full


@once()
def loss_slope_and_parts(objective, params, averages, key):
    def loss(params):
        progress = Progress(jnp.zeros(()), num_steps=1)
        return objective(half_without, params, averages, key, BATCH, progress)[0]

    time_key, here_key, noise_key = jax.random.split(key, 3)
    t, s = objective.steps(time_key, 32)
    here = objective.times.quantile(objective.uniforms(here_key, 32), objective.path)
    noised = objective.noised(t, noise_key, BATCH)
    return *with_slope(loss, params), t, s, here, noised.x_t, noised.pair.eps


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_end_moves_with_the_averages_velocity_and_the_networks_is_the_datas(scale):
    with jax.enable_x64(True):
        objective = replace(TVM, guidance_scale=scale)
        found = loss_slope_and_parts(objective, 1.3, 0.9, jax.random.key(3))
    loss, slope, t, s, here, x_t, eps = jax.device_get(found)
    x0 = BATCH["image"]
    x_here = (1 - here)[:, None] * x0 + here[:, None] * eps
    velocity = scale * (eps - x0) + (1 - scale) * 0.5 * u_in_numpy(0.9, x_here, here, here)

    def end(own, s):
        return x_t - (t - s)[:, None] * u_in_numpy(own, x_t, t, s)

    there = u_in_numpy(0.9, end(1.3, s), s, s)

    def by_hand(own):
        motion = (end(own, s + 1e-5) - end(own, s - 1e-5)) / 2e-5
        matching = u_in_numpy(own, x_here, here, here) - velocity
        return (np.square(motion - there) + np.square(matching)).mean(axis=1)

    np.testing.assert_allclose(loss, by_hand(1.3), rtol=1e-6)
    expected = (by_hand(1.3 + 1e-5) - by_hand(1.3 - 1e-5)) / 2e-5
    np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=1e-5)


def test_lengths_have_their_density_and_ends_that_of_the_times_that_fit():
    t, s = jax.jit(TVM.steps, static_argnums=1)(jax.random.key(0), 20_000)
    t, s = np.asarray(t, np.float64), np.asarray(s, np.float64)
    assert (t <= 1.0).all()
    assert (s >= 0.0).all()
    length = t - s
    logits = np.log(length / (1 - length))
    np.testing.assert_allclose([np.mean(logits), np.std(logits)], [-0.8, 1.0], atol=0.03)
    # Of the authors' draws by rejection, for the lengths about a half.
    drawn = 1 / (1 + np.exp(0.4 - np.random.default_rng(0).standard_normal(200_000)))
    expected = np.quantile(drawn[drawn < 0.5], [0.1, 0.5, 0.9])
    near = s[np.abs(length - 0.5) < 0.02]
    np.testing.assert_allclose(np.quantile(near, [0.1, 0.5, 0.9]), expected, atol=0.03)


def test_it_declares_its_teacher_and_its_derivative():
    assert TVM.traits.has_teacher
    assert TVM.traits.forward_mode


@pytest.mark.thorough
def test_the_exact_average_velocity_is_a_minimum():
    found = verify_objective(TVM, GAUSSIAN, num_batches=16, limit=0.2, fraction=1.0)
    assert found.passed, found
