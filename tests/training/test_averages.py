"""Averages over training: the weights that they give to each step, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.training.averages import LONGEST, Averages, gamma_of
from tests.support.power_profiles import weights_of_steps


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, 0.25, LONGEST])
def test_the_width_of_the_profile_over_the_run_is_its_length(length):
    """A mean over cells (i − 1, i] of the run, each with all of its mass and its own variance."""
    t = 100_000
    weights = weights_of_steps(length, t)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    middles = np.arange(1, t + 1) - 0.5
    mean = weights @ middles
    deviation = np.sqrt(weights @ (middles - mean) ** 2 + 1 / 12)
    assert deviation / t == pytest.approx(length, rel=1e-6)


def test_the_longest_average_is_the_mean_over_all_steps():
    assert abs(gamma_of(LONGEST)) < 0.05
    assert gamma_of(1 / np.sqrt(12)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.25])
def test_one_step_keeps_the_share_of_the_power_function(length):
    """β_t = (1 − 1/t)^(γ + 1): what is left of an average of zeros when a one comes in."""
    averages = Averages(lengths=(length,))
    name = averages.names[0]
    for t in (1, 2, 10, 1_000, 1_000_000):
        after = averages.update({name: jnp.zeros(())}, jnp.ones(()), jnp.array(t - 1))
        expected = -np.expm1((gamma_of(length) + 1) * np.log1p(-1 / t)) if t > 1 else 1.0
        assert float(after[name]) == pytest.approx(expected, rel=2e-5)


def test_after_many_steps_each_has_the_weight_of_its_cell_of_the_profile():
    """Of a random walk, in float64 from the closed form; the first parameters are forgotten."""
    averages, steps = Averages((0.9,), (0.05, 0.2)), 300
    rng = np.random.default_rng(0)
    path = np.cumsum(rng.normal(size=(steps, 4)), axis=0)

    def one(current, at):
        step, params = at
        return averages.update(current, params, step), None

    begin = averages.init(jnp.full(4, 1e6))
    after, _ = jax.lax.scan(one, begin, (jnp.arange(steps), jnp.asarray(path, jnp.float32)))
    for length in averages.lengths:
        expected = weights_of_steps(length, steps) @ path
        found = after[f"power-{length:g}"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_weights_are_named_in_the_users_order():
    averages = Averages((0.99, 0.9), (0.10, 0.05))
    assert averages.names == ("ema-0.99", "ema-0.9", "power-0.1", "power-0.05")
    assert Averages().update({}, jnp.ones(()), jnp.array(0)) == {}
