"""Inductive moment matching: its loss by hand, its times, and the exact flow map."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.compiling import once
from diffjax.conditions import of_classes
from diffjax.errors import UserError
from diffjax.objectives.base import Progress
from diffjax.objectives.few_step.moments import InductiveMomentMatching
from diffjax.oracle.verify import verify_objective
from diffjax.process import paths, targets, times, weights
from diffjax.process.precond import Precond, TimeLabel
from diffjax.wiring import check_wired, wire
from tests.objectives.few_step.test_flow_maps import (
    BATCH,
    GAUSSIAN,
    smooth_network,
    u_in_numpy,
    with_slope,
)
from tests.objectives.test_objectives import config_for

IMM = InductiveMomentMatching(
    paths.Linear(t_noise=0.994),
    Precond(targets.Velocity(), TimeLabel(1.0)),
    weights.Constant(),
    times.Uniform(),
)


@once()
def loss_slope_and_parts(objective, params, key):
    def loss(params):
        return objective(
            smooth_network, params, params, key, BATCH, Progress(jnp.zeros(()), num_steps=1)
        )[0]

    time_key, noise_key = jax.random.split(key)
    n = len(BATCH["image"]) // objective.particles
    three = objective.three_times(time_key, n)
    t = jnp.repeat(three[0], objective.particles)
    noised = objective.noised(t, noise_key, BATCH)
    return *with_slope(loss, params), three, noised.x_t


def found(objective):
    with jax.enable_x64(True):
        return jax.device_get(loss_slope_and_parts(objective, 1.3, jax.random.key(3)))


def by_hand(objective, three, x_t, own):
    """The loss with parameters `own` where it is differentiated, and 1.3 elsewhere."""
    t, r, s = (np.repeat(each, objective.particles) for each in three)
    x0 = BATCH["image"]
    # DDIM's step from t to r with the known image.
    ratio = (r / t)[:, None]
    x_r = ((1 - r)[:, None] - ratio * (1 - t)[:, None]) * x0 + ratio * x_t
    y = x_t - (t - s)[:, None] * u_in_numpy(own, x_t, t, s)
    other = x_r - (r - s)[:, None] * u_in_numpy(1.3, x_r, r, s)
    loss = []
    for first in range(0, len(t), objective.particles):
        group = range(first, first + objective.particles)

        def k(a, b, reach=t[first] - s[first]):
            return np.exp(-max(np.linalg.norm(a - b), 1e-4) / (2 * reach))

        pairs = [(i, j) for i in group for j in group]
        terms = [k(y[i], y[j]) + k(other[i], other[j]) - 2 * k(y[i], other[j]) for i, j in pairs]
        loss += [np.mean(terms)] * objective.particles
    log_snr, slope = 2 * np.log((1 - t) / t), -2 / (t * (1 - t))
    weight = -0.5 * slope / (1 + np.exp(log_snr - 4)) * (1 - t) ** 2 / ((1 - t) ** 2 + t**2)
    return weight * np.array(loss)


@pytest.mark.parametrize("particles", [pytest.param(1, marks=pytest.mark.thorough(tenth=False)), 4])
def test_the_loss_is_the_discrepancy_of_groups(particles):
    """With one particle it is a consistency loss, as the paper's section on these says."""
    objective = replace(IMM, particles=particles, halvings=7.0)
    loss, slope, three, x_t = found(objective)
    np.testing.assert_allclose(loss, by_hand(objective, three, x_t, 1.3), rtol=1e-5, atol=1e-9)
    ends = [by_hand(objective, three, x_t, 1.3 + h) for h in (1e-6, -1e-6)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-7)


def test_times_are_in_order_and_the_level_falls_by_equal_steps():
    t, r, s = jax.jit(IMM.three_times, static_argnums=1)(jax.random.key(1), 4000)
    assert (s <= r).all()
    assert (r < t).all()
    t, r, s = (np.asarray(each, np.float64) for each in (t, r, s))
    free = (r > s) & (t - r > 2e-4)
    assert free.mean() > 0.5
    steps = (t / (1 - t) - r / (1 - r))[free & (t < 0.9)]
    np.testing.assert_allclose(steps, 160 / 2**12, rtol=1e-3)
    # Uniform, and uniform under it.
    assert abs(np.mean(t) - 0.4975) < 0.02
    assert abs(np.mean((s - 1e-3) / (t - 1e-3)) - 0.5) < 0.02


def test_a_batch_has_whole_groups():
    wired = wire(config_for(objective="imm"), (8, 8, 1), of_classes(3))
    check_wired(wired, 16, 10)
    with pytest.raises(UserError, match="batch_size 18 is no multiple of 4 particles"):
        check_wired(wired, 18, 10)


@pytest.mark.thorough
def test_the_exact_flow_map_is_a_minimum():
    assert verify_objective(IMM, GAUSSIAN, num_batches=16, limit=0.4, fraction=1.0).passed
