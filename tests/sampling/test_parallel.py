"""Parallel in time: the same samples in fewer rounds."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.errors import UserError
from diffjax.evaluation.convergence import mixture_of_four
from diffjax.process.paths import Cosine, Linear
from diffjax.sampling import runge_kutta, solvers, unipc
from diffjax.sampling.grids import Power
from diffjax.sampling.parallel import sample_in_parallel
from diffjax.sampling.sample import draw, sample

DATA, N = mixture_of_four(), 40


def drawn(path, solver, n=N, **how: Any) -> Any:
    keys = jax.random.split(jax.random.key(0), 16)
    walk: Any = partial(sample_in_parallel, **how) if how else sample
    times, predict = Power()(path, n), DATA.predict(path)
    program = jax.jit(lambda keys: draw(predict, path, solver, times, keys, None, (2,), walk=walk))
    return program(keys)


@pytest.mark.parametrize("path", [Linear(), Cosine()])
@pytest.mark.parametrize("solver", [solvers.ddim(), runge_kutta.rk4(), solvers.ddpm()])
def test_without_tolerance_it_is_the_sequential_sample(path, solver):
    found = drawn(path, solver, window=8, tolerance=0.0)
    np.testing.assert_allclose(found.x, drawn(path, solver), atol=2e-5)


@pytest.mark.parametrize("window", [1, 4, 64])
def test_a_wider_window_takes_fewer_rounds(window):
    path, solver = Linear(), solvers.ddim()
    found = drawn(path, solver, window=window, tolerance=1e-3)
    np.testing.assert_allclose(found.x, drawn(path, solver), atol=0.05)
    # N - 1 steps and the last prediction; one step at a time is the sequential walk.
    most = {1: N, 4: 0.65 * N, 64: 0.45 * N}[window]
    assert found.rounds <= most
    assert (found.rounds == N) == (window == 1)


def test_one_step_is_the_last_prediction():
    found = drawn(Linear(), solvers.ddim(), n=1, window=4)
    np.testing.assert_allclose(found.x, drawn(Linear(), solvers.ddim(), n=1), atol=1e-6)
    assert found.rounds == 1


def test_the_window_is_spread_over_devices():
    mesh = Mesh(np.array(jax.devices()), ("window",))
    place = NamedSharding(mesh, PartitionSpec("window"))
    how = {"window": 8, "tolerance": 1e-3}
    found = drawn(Linear(), solvers.ddim(), **how)
    spread = drawn(Linear(), solvers.ddim(), **how, place=place)
    np.testing.assert_allclose(found.x, spread.x, atol=1e-5)
    assert found.rounds == spread.rounds


def test_a_solver_that_looks_back_is_refused():
    with pytest.raises(UserError, match="looks back at earlier steps"):
        drawn(Linear(), unipc.unipc(), window=4)
