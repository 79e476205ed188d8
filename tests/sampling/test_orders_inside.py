"""Solvers that look back are of their declared order from inside the path, without a history.

Image-to-image, inversion and Restart start there.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import choices
from diffjax.compiling import once
from diffjax.oracle import analytic
from diffjax.sampling import adams, dpm_solver, unipc
from diffjax.sampling.solvers import Interval
from diffjax.spec import build

ROWS = {
    name: solver
    for name, solver in ((name, build(row)) for name, row in choices.SOLVERS.items())
    if jax.tree.leaves(solver.init(jnp.zeros((1, 1)))) and not solver.fresh_noise and solver.nfe
}
VARIANTS = {
    **{f"ab_{order}": adams.ab(order) for order in (1, 3, 4)},
    **{f"lms_{order}": adams.lms(order) for order in (2, 3)},
    **{f"deis_{order}": adams.deis(order) for order in (1, 2, 4)},
    **{f"exp_ab_{order}": adams.exp_ab(order) for order in (2, 4)},
    **{f"unipc_{order}_bh1": unipc.unipc(order, unipc.BH1()) for order in (1, 2, 3)},
    **{f"unip_{order}": unipc.unipc(order, corrector=False) for order in (1, 2, 3)},
    "unipc_1": unipc.unipc(1),
    "dpmpp_3m_no_noise": dpm_solver.dpmpp_multistep(3, eta=0.0),
}
MEASURED = ROWS | VARIANTS
# Of each kind of first steps; the other forms of `adams` share them.
QUICK = ("dpmpp_2m", "dpmpp_3m", "unipc_3", "plms", "exp_ab", "lms")

MOST = 1024
FAR = (0.95, (32, 64, 128))
# From 0.95 the first step's error is small, and hides on short walks; from here it does not.
NEAR = (0.6, (256, 512, MOST))


def mixture():
    """Four Gaussians in three dimensions, near enough for a smooth flow."""
    rng = np.random.default_rng(0)
    roots = 0.3 * rng.normal(size=(4, 3, 3))
    return analytic.GaussianMixture(
        jnp.asarray([0.1, 0.2, 0.3, 0.4]),
        jnp.asarray(rng.normal(size=(4, 3))),
        jnp.asarray(0.3 * np.eye(3) + roots @ roots.transpose(0, 2, 1)),
    )


@cache
def exact(path_name, start):
    """Beginnings, and where the flow carries them from `start` to 0.1."""
    path, x = build(choices.PATHS[path_name]), np.random.default_rng(1).normal(size=(8, 3))
    return x, jax.device_get(_flow(mixture(), path, x, start))


@once()
def _flow(data, path, x, start):
    return data.flow(path, x, start, 0.1)


def slopes(solver, path_name, *walks):
    """How fast the error at t = 0.1 falls, with equal steps: of each beginning and its counts."""
    path = build(choices.PATHS[path_name])

    @jax.jit
    def walk(times, n, x):
        predict = mixture().predict(path)

        def body(i, state):
            x, memory = state
            interval = Interval(path, times[i], times[i + 1], jnp.zeros(len(x)))
            return solver.step(
                lambda x, t: predict(x, jnp.full(len(x), t), None), interval, memory, x
            )

        return jax.lax.fori_loop(0, n, body, (x, solver.init(x)))[0]

    def slope(start, counts):
        x, end = exact(path_name, start)
        times = {n: np.pad(np.linspace(start, 0.1, n + 1), (0, MOST - n)) for n in counts}
        ends = [np.asarray(walk(times[n], n, x)) for n in counts]
        errors = [np.sqrt(np.mean((found - end) ** 2)) for found in ends]
        return -np.polyfit(np.log(counts), np.log(errors), 1)[0]

    return [slope(*each) for each in walks]


def test_all_rows_that_look_back_are_measured():
    looking_back = "dpmpp_2m dpmpp_3m unipc unipc_3 deis lms plms ab exp_ab"
    assert set(looking_back.split()) <= set(ROWS)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        pytest.param(
            name,
            path,
            marks=[] if name in QUICK and path == "linear" else pytest.mark.thorough(tenth=False),
        )
        for name in MEASURED
        for path in ("linear", "cosine")
    ],
)
def test_the_declared_order_holds_from_inside_the_path(name, path):
    """And no higher one does: from nearer to the data it shows."""
    solver = MEASURED[name]
    with jax.enable_x64(True):
        far, near = slopes(solver, path, FAR, NEAR)
    assert far > solver.order - 0.3
    # Where the next term of the error is large, a slope lies above; the next order would be 1 more.
    assert solver.order - 0.3 < near < solver.order + 0.5
