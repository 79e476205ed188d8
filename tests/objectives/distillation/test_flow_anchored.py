"""Flow-anchored consistency: both losses and their gradient by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from diffjax.compiling import once
from diffjax.objectives.base import Progress
from diffjax.objectives.distillation.flow_anchored import FlowAnchored
from diffjax.objectives.few_step.consistency import FromTeacher
from diffjax.oracle.verify import verify_objective
from diffjax.wiring import traits_of
from tests.objectives.few_step.test_flow_maps import (
    BATCH,
    GAUSSIAN,
    by_parameter,
    of,
    smooth_network,
    u_in_numpy,
)


@once()
def loss_slope_and_parts(objective, key):
    def loss(params):
        progress = Progress(jnp.zeros(()), num_steps=1)
        return objective(smooth_network, params, 0.9, key, BATCH, progress)[0]

    noised = objective.at_random_times(key, BATCH)
    velocity = noised.pair.eps - noised.pair.x0
    return loss(1.3), jax.jacfwd(loss)(1.3), noised.c.t.ravel(), noised.x_t, velocity


def square(d):
    return np.square(d).mean(axis=1)


@pytest.mark.parametrize("teacher", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_the_anchor_and_the_relaxed_target_are_those_of_the_authors(teacher):
    objective = of(FlowAnchored)
    if teacher:
        objective = replace(objective, prediction=FromTeacher())
    with jax.enable_x64(True):
        found = jax.device_get(loss_slope_and_parts(objective, jax.random.key(3)))
    loss, slope, t, x, v = found
    if teacher:
        v = u_in_numpy(0.9, x, t, t)

    def cosine(w):
        u = u_in_numpy(w, x, t, t)
        return (u * v).sum(axis=1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)

    def anchor(w):
        return square(u_in_numpy(w, x, t, t) - v) + 1.0 - cosine(w)

    zero = np.zeros_like(t)

    def along(h):
        return u_in_numpy(1.3, x + h * v, t + h, zero)

    gap = along(0.0) - (v - t[:, None] * (along(1e-5) - along(-1e-5)) / 2e-5)
    assert (np.abs(gap) > 1.0).any()
    step = (1.0 - np.sqrt(1.0 - t))[:, None] * np.clip(gap, -1.0, 1.0)
    near = np.cos(0.5 * np.pi * (1.0 - t)) / np.sqrt(square(step) + 1e-3)
    np.testing.assert_allclose(loss, anchor(1.3) + near * square(step), rtol=1e-5)
    by_hand = (anchor(1.3 + 1e-5) - anchor(1.3 - 1e-5)) / 2e-5
    by_hand += near * (2.0 * step * by_parameter(x, t, zero)).mean(axis=1)
    np.testing.assert_allclose(slope, by_hand, rtol=1e-3, atol=1e-5)


def test_its_row_samples_in_any_number_of_steps():
    traits = traits_of(digits.get_config("objective=facm"))
    assert (traits.solver, traits.forward_mode, traits.distils) == ("flow_map", True, False)
    assert not traits_of(digits.get_config("objective=facm,derivative=central")).forward_mode


@pytest.mark.thorough
def test_without_cosine_and_adaptive_weight_the_exact_average_velocity_is_a_minimum():
    """The cosine is smallest in the direction of the mean of directions, the power moves it too."""
    objective = of(FlowAnchored, cosine=0.0, power=0.0)
    found = verify_objective(objective, GAUSSIAN, num_batches=16, limit=0.5)
    assert all(abs(z) < 4.5 for z in found.z.values()), found
