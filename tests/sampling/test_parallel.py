"""Parallel in time: the same samples in fewer rounds."""

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.errors import UserError
from diffjax.process.paths import Cosine, Linear
from diffjax.sampling import runge_kutta, solvers, unipc
from diffjax.sampling.grids import Power
from diffjax.sampling.parallel import InParallel
from diffjax.sampling.sample import sample, starting_noise, with_condition
from diffjax.studies.convergence import mixture_of_four
from tests.support.numbered_paths import numbered

DATA, N = mixture_of_four(), 40
DDIM, RK4, DDPM = solvers.ddim(), runge_kutta.rk4(), solvers.ddpm()
BOTH = Linear(), Cosine()


@cache
def program(solver, **how: Any):
    """`(path's number, times, keys, tolerance) -> samples`, compiled once for both paths."""
    path_of = numbered(BOTH)

    @jax.jit
    def run(number, times, keys, tolerance):
        path = path_of(number)
        walk: Any = InParallel(tolerance=tolerance, **how) if how else sample
        denoise = with_condition(DATA.predict(path), None)
        noise, keys = starting_noise(keys, (2,))
        return walk(denoise, solver, path, times, keys, path.sigma(times[0]) * noise)

    return run


def drawn(solver, number=0, n=N, tolerance=0.0, **how: Any) -> Any:
    keys, path = jax.random.split(jax.random.key(0), 16), BOTH[number]
    times = solver.route(path, Power()(path, n))
    return program(solver, **how)(number, times, keys, tolerance)


@pytest.mark.parametrize(
    "solver",
    [
        DDIM,
        pytest.param(RK4, marks=pytest.mark.thorough(tenth=False)),
        DDPM,
        pytest.param(solvers.unfinished(DDIM), marks=pytest.mark.thorough(tenth=False)),
    ],
    ids=["ddim", "rk4", "ddpm", "unfinished"],
)
def test_without_tolerance_it_is_the_sequential_sample(solver):
    for number, path in enumerate(BOTH):
        found = drawn(solver, number, window=8)
        np.testing.assert_allclose(found.x, drawn(solver, number), atol=2e-5, err_msg=str(path))


@pytest.mark.parametrize(
    "window", [pytest.param(n, marks=pytest.mark.thorough) for n in (1, 4, 64)] + [8]
)
def test_a_wider_window_takes_fewer_rounds(window):
    found = drawn(DDIM, window=window, tolerance=1e-3)
    np.testing.assert_allclose(found.x, drawn(DDIM), atol=0.05)
    # N - 1 steps and the last prediction; one step at a time is the sequential walk.
    most = {1: N, 4: 0.65 * N, 8: 0.55 * N, 64: 0.45 * N}[window]
    # In a round no more points are settled than the window has.
    assert -(-(N - 1) // window) + 1 <= found.rounds <= most
    assert (found.rounds == N) == (window == 1)


def test_one_step_is_the_last_prediction():
    found = drawn(DDIM, n=1, tolerance=1e-2, window=4)
    np.testing.assert_allclose(found.x, drawn(DDIM, n=1), atol=1e-6)
    assert found.rounds == 1


def test_the_window_is_spread_over_devices():
    mesh = Mesh(np.array(jax.devices()), ("window",))
    place = NamedSharding(mesh, PartitionSpec("window"))
    found = drawn(DDIM, tolerance=1e-3, window=8)
    spread = drawn(DDIM, tolerance=1e-3, window=8, place=place)
    np.testing.assert_allclose(found.x, spread.x, atol=1e-5)
    assert found.rounds == spread.rounds


def test_a_solver_that_looks_back_is_refused():
    with pytest.raises(UserError, match="uses earlier evaluations"):
        drawn(unipc.unipc(), window=4)
