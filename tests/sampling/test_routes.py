"""Solvers that choose their times: adaptive ones, restart, resampling."""

from functools import partial

import jax
import numpy as np
import pytest

from diffjax import choices
from diffjax.errors import UserError
from diffjax.sampling import adaptive, grids, restart, runge_kutta, solvers
from diffjax.sampling.sample import Recipe, integrate
from diffjax.spec import build
from tests.support.compilations import compilations
from tests.support.normals import Normals

PATHS = {name: build(choices.PATHS[name]) for name in ("linear", "edm")}


def test_an_adaptive_solver_is_as_exact_as_it_is_told_to_be():
    data, path = Normals(np.array([0.8, -0.5]), np.array([0.05, 0.3])), PATHS["linear"]
    keys = jax.random.split(jax.random.key(0), 64)
    x = np.random.default_rng(1).standard_normal((64, 2)).astype("f")
    ends = np.array([path.t_noise, path.t_min])
    exact = data.flow(1.0 - ends, ends, x)[1]

    def denoise(x, t):
        return data.pair(path, x, t)

    times = Recipe(adaptive.adaptive(), grids.Power(), 3).times(path)
    np.testing.assert_array_equal(times, np.array([path.t_noise, path.t_min, 0.0], "f"))

    @jax.jit
    def end(tolerance, x):
        solver = adaptive.adaptive(tolerance, 256)
        return integrate(denoise, solver, path, times[:-1], keys, x)

    worst = []
    for tolerance in (1e-2, 1e-5):
        worst.append(np.abs(end(tolerance, x) - exact).max())
        # Another batch has other steps: the same sample within tolerance.
        others = end(tolerance, np.concatenate([x[:5], np.tile(x[5:6], (59, 1))]))
        np.testing.assert_allclose(others[:5], exact[:5], atol=30 * tolerance)
    assert worst[1] < min(3e-3, 0.1 * worst[0])
    # What float32 can't meet takes more steps than there may be.
    assert not np.isfinite(end(1e-12, x)).any()


def test_adaptive_steps_with_fresh_noise_have_the_moments_of_the_data():
    mean, variance = np.array([0.8, -0.5]), np.array([0.05, 0.3])
    data, path, n = Normals(mean, variance), PATHS["linear"], 1024
    x = np.random.default_rng(1).standard_normal((n, 2)).astype("f")
    times, keys = np.float32([path.t_noise, path.t_min]), jax.random.split(jax.random.key(0), n)

    def denoise(x, t):
        return data.pair(path, x, t)

    solver = adaptive.adaptive_sde(tolerance=0.05)
    end = np.asarray(jax.jit(partial(integrate, denoise, solver, path, times))(keys, x))
    np.testing.assert_allclose(end.mean(0), mean, atol=0.02 + 4 * np.sqrt(0.3 / n))
    np.testing.assert_allclose(end.var(0), variance, rtol=0.05 + 4 * np.sqrt(2 / n))


def test_restart_walks_its_interval_again():
    path = PATHS["linear"]
    solver = restart.restart(solvers.ddim(), low=0.3, high=1.0, times=2, num_steps=3)
    times = np.asarray(Recipe(solver, grids.Power(), 5).times(path))
    # σ = t/(1 - t): at most 0.3 from t = 0.23 on, which is 0.2 on this grid; 1 is t = 0.5.
    plain = [1.0, 0.8, 0.6, 0.4, 0.2]
    np.testing.assert_allclose(times[:5], plain, atol=1e-6)
    np.testing.assert_allclose(times[5::4][:2], 0.5, atol=1e-5)
    np.testing.assert_allclose(times[8::4], 0.2, atol=1e-6)
    assert len(times) == 5 + 2 * 4 + 1
    assert times[-1] == 0.0
    inside = times[5:9] / (1 - times[5:9])
    np.testing.assert_allclose(inside[1:] / inside[:-1], inside[1] / inside[0], rtol=1e-3)
    with pytest.raises(UserError, match="set low < high"):
        restart.restart(solvers.ddim(), low=2.0)


def test_restart_compiles_nothing_for_another_number_of_steps():
    path, solver = PATHS["linear"], restart.restart(solvers.ddim())
    grid = {n: jax.device_put(np.append(np.linspace(1, 0.01, n), 0).astype("f")) for n in (6, 7)}
    solver.route(path, grid[6])
    with compilations() as programs:
        solver.route(path, grid[7])
    assert not programs


def test_restart_shrinks_the_error_that_was_there():
    """Samples that are too wide by half: noise is added to their variance, and the flow scales it.

    Of `σ² + 1` at the low level, the flow of standard normal data makes `(σ² + 1)` times the ratio
    of the two levels' variances.
    """
    path, n = PATHS["edm"], 20_000
    data = Normals(np.zeros(1), np.ones(1))
    solver = restart.restart(runge_kutta.edm_heun(), low=0.1, high=2.0, times=1, num_steps=40)
    low, high = 0.1, 2.0
    x = np.random.default_rng(0).standard_normal((n, 1)).astype("f")
    x *= 1.5 * np.sqrt(1 + low**2)
    levels = np.exp(np.linspace(np.log(high), np.log(low), 41))
    times = np.concatenate([[low], levels]).astype("f")

    def denoise(x, t):
        return data.pair(path, x, t)

    keys = jax.random.split(jax.random.key(1), n)
    end = jax.jit(partial(integrate, denoise, solver, path, times))(keys, x)
    up = 1.5**2 * (1 + low**2) + high**2 - low**2
    expected = np.sqrt(up / (1 + high**2) * (1 + low**2))
    assert float(end.std()) == pytest.approx(expected, rel=0.02)
    assert expected < 1.15 * np.sqrt(1 + low**2)  # of 1.5 times


def test_resampling_visits_each_stretch_again():
    solver = restart.resampled(solvers.ddim(), jump=2, times=2)
    times = Recipe(solver, grids.Power(), 5).times(PATHS["linear"])
    expected = [1.0, 0.8, 0.6, 1.0, 0.8, 0.6, 0.4, 0.2, 0.6, 0.4, 0.2, 0.0]
    np.testing.assert_allclose(times, expected, atol=1e-6)
    assert Recipe(solver, grids.Power(), 5).nfe == 8 + 1


def test_a_walk_that_does_not_finish_costs_whole_steps_alone():
    """Heun's 5 steps are two evaluations each; finished, the last is the one for x0."""
    assert Recipe(solvers.heun(), grids.Power(), 5).nfe == 4 * 2 + 1
    assert Recipe(solvers.unfinished(solvers.heun()), grids.Power(), 5).nfe == 5 * 2
