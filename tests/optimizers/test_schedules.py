"""The warm-up of the learning rate: as long as it is set, and without a step of rate 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.optimizers.descent import descent
from diffjax.optimizers.schedules import Constant, Cosine, InverseSqrt, warmed_up


@pytest.mark.parametrize("num_steps", [8, 100, 200])
def test_the_nth_step_of_a_warmup_has_n_parts_of_the_peak(num_steps):
    """However long the run is: step 8 of 100 has 1.6e-4 of 2e-3, and not a whole ramp's 1.75e-3."""
    schedule = descent(num_steps, learning_rate=2e-3, warmup_steps=100).schedule
    for n in (1, 4, 8):
        assert np.asarray(schedule(n - 1)).item() == pytest.approx(2e-3 * n / 100, rel=1e-6)


def test_the_peak_is_where_the_warmup_ends_and_the_decay_begins():
    schedule = descent(30, learning_rate=3.0, warmup_steps=10, schedule=Cosine(0.1)).schedule
    assert [np.asarray(schedule(n - 1)).item() for n in (10, 11)] == pytest.approx([3.0, 3.0])
    # Half of the way down a cosine from 1 to 0.1, and all of it.
    assert [np.asarray(schedule(n - 1)).item() for n in (21, 31)] == pytest.approx(
        [3.0 * 0.55, 0.3]
    )


def test_without_a_warmup_the_first_step_has_the_peak():
    assert np.asarray(descent(10, learning_rate=0.5, warmup_steps=0).schedule(0)).item() == 0.5


def test_the_first_step_is_not_dead():
    """Adam's first step is the rate times the gradient's sign."""
    transform = descent(10, learning_rate=1.0, warmup_steps=4).transform

    @jax.jit
    def updates(gradient):
        return transform.update(gradient, transform.init(gradient), gradient)[0]

    update = updates(np.float32([0.3, -0.2]))
    assert np.asarray(update).tolist() == pytest.approx([-0.25, 0.25], rel=1e-5)


def rates(schedule, warmup_steps, num_steps, steps):
    rate = warmed_up(schedule, 2.0, warmup_steps, num_steps)
    return [np.asarray(rate(jnp.asarray(n))).item() for n in steps]


def test_a_cosine_warms_up_and_falls_to_its_final_fraction():
    found = rates(Cosine(0.1), 10, 100, (0, 4, 9, 55, 100))
    assert found == pytest.approx([0.2, 1.0, 2.0, 0.5 * (2.0 + 0.2), 0.2])


def test_a_cosine_that_keeps_all_of_the_peak_is_a_constant_bit_for_bit():
    steps = range(0, 40, 3)
    assert rates(Cosine(1.0), 5, 40, steps) == rates(Constant(), 5, 40, steps)


@pytest.mark.parametrize(("warmup_steps", "constant_steps"), [(0, 0), (100, 0), (10, 50), (80, 50)])
def test_the_inverse_root_falls_with_the_root_of_the_step_and_without_a_jump(
    warmup_steps, constant_steps
):
    """2/√max(1, n/r), with n from the run's start; quadrupling the steps halves the rate."""
    r = max(warmup_steps, constant_steps, 1)
    steps = (warmup_steps, r, 2 * r, 4 * r, 16 * r)
    expected = [2.0, 2.0, 2.0 / np.sqrt(2.0), 1.0, 0.5]
    found = rates(InverseSqrt(constant_steps), warmup_steps, 7, steps)
    assert found == pytest.approx(expected, rel=1e-6)
