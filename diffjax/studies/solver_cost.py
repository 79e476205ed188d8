"""Measures the cost of a solver's own arithmetic relative to its network evaluations."""

import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array

from diffjax.compiling import jit
from diffjax.process.paths import Pair, Path
from diffjax.sampling.grids import Power
from diffjax.sampling.sample import Recipe, integrate
from diffjax.sampling.solvers import Solver


def solver_costs(
    network: Callable[[Array, Array], Array],
    path: Path,
    solvers: Mapping[str, Solver],
    shape: tuple[int, ...],
    rounds: int = 5,
    num_steps: int = 21,
) -> dict[str, float]:
    """Time of each solver's own arithmetic, divided by the time of its network evaluations.

    The steps are timed with a trivial model (two multiplications per number), whose time counts as
    the solver's. The network is timed separately. Results are medians over rounds; each round times
    everything.

    Args:
        network: `(x, t[B]) -> ` an array like `x`; it is jitted here.
        path: the path from data to noise.
        solvers: solvers by name, with a fixed number of evaluations.
        shape: shape of a batch, `(B, H, W, C)`.
        rounds: number of measurements; 5 is typical.
        num_steps: intervals of the grid; 21 is typical.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> from diffjax.sampling.solvers import euler
        >>> shares = solver_costs(
        ...     lambda x, t: x @ x @ x, Linear(), {"euler": euler()}, (2, 64, 64), rounds=1
        ... )
        >>> shares["euler"] > 0
        True
    """
    x, keys = jnp.ones(shape), jax.random.split(jax.random.key(0), shape[0])

    def denoise(x: Array, t: Array) -> Pair:
        return Pair(0.5 * x, 0.8 * x, jnp.full_like(x, 0.5))

    def walk(solver: Solver) -> Callable[[], Array]:
        times = Recipe(solver, Power(), num_steps).times(path)[:-1]
        program = jax.jit(lambda x, keys: integrate(denoise, solver, path, times, keys, x))
        return lambda: program(x, keys)

    evaluate = jit(network)
    programs = {name: walk(solver) for name, solver in solvers.items()}
    programs[""] = lambda: evaluate(x, jnp.full(shape[0], 0.5))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for round_number in range(rounds + 1):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program())
            if round_number:  # the first one compiles
                seconds[name].append(time.perf_counter() - began)
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        name: middle[name] / (solver.steps(num_steps - 1) * (solver.nfe or 1) * middle[""])
        for name, solver in solvers.items()
    }
