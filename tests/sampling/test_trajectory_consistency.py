"""TCD's solver: against its formula on a table of betas that NumPy makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.process.beta_tables import ScaledLinearBetas
from diffjax.process.paths import Pair
from diffjax.sampling.consistency import trajectory_consistency
from diffjax.sampling.solvers import Interval, ddim, normal

ALPHA_BAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
KEYS = jax.random.split(jax.random.key(0), 3)
INTERVAL = Interval(ScaledLinearBetas(), jnp.array(0.75), jnp.array(0.5), KEYS)
PAIR = Pair(jnp.full((3, 2), 0.7), jnp.full((3, 2), -1.3))


def step(solver):
    x, _ = solver.step(lambda x, t: PAIR, INTERVAL, (), jnp.zeros((3, 2)))
    return np.asarray(x)


@pytest.mark.parametrize("gamma", [0.3, 0.5, 1.0])
def test_a_step_is_a_jump_beyond_the_next_time_and_the_noise_of_the_rest(gamma):
    """From 0.75 to 0.5, step 499 of the table; the jump goes to step ⌊(1 - gamma)·499⌋."""
    to, beyond = ALPHA_BAR[499], ALPHA_BAR[int((1 - gamma) * 499)]
    jumped = np.sqrt(beyond) * 0.7 + np.sqrt(1 - beyond) * -1.3
    fresh = np.sqrt(1 - to / beyond) * np.asarray(normal(KEYS, (2,)))
    expected = np.sqrt(to / beyond) * jumped + fresh
    np.testing.assert_allclose(step(trajectory_consistency(gamma)), expected, rtol=2e-5)


def test_its_published_jump_is_three_tenths():
    np.testing.assert_array_equal(
        step(trajectory_consistency()), step(trajectory_consistency(0.3, 1000))
    )


def test_without_a_jump_beyond_it_is_ddim():
    np.testing.assert_allclose(step(trajectory_consistency(0.0)), step(ddim()), rtol=1e-6)
