"""Sampling with a model of the end of the flow: jump to the end, add noise again, and repeat."""

from typing import Any

from jax import Array

from diffjax.process.paths import Path, coeffs
from diffjax.process.precond import Meaning
from diffjax.sampling import solvers
from diffjax.sampling.solvers import Denoise, Solver, same_for_equal
from diffjax.shapes import OneNumber, Samples


@same_for_equal
def consistency() -> Solver:
    """Multistep consistency sampling: `x' = a'·f(x, t) + s'·z` with fresh noise `z ~ N(0, I)`.

    `f(x, t)` is the end of the flow from `x`, so one step is a sample, and more steps correct it.
    For objectives whose prediction is the end of the flow: with a posterior mean in the place of
    `f`, samples have too little variance. Song et al. 2023 (arXiv:2303.01469), algorithm 1.
    """

    def step(
        denoise: Denoise,
        path: Path,
        memory: Any,
        x: Samples,
        t: OneNumber,
        t_next: OneNumber,
        keys: Array,
    ) -> tuple[Samples, Any]:
        there = coeffs(path, t_next[None], x.ndim)
        return there.a * denoise(x, t).x0 + there.s * solvers.normal(keys, x.shape[1:]), memory

    return Solver(lambda x: (), step, nfe=1, order=1, fresh_noise=True, needs=Meaning.END_OF_FLOW)
