"""Sampling with a model of the end of the flow: jump to the end, add noise again, and repeat."""

from typing import Any

from diffjax.process.paths import Pair
from diffjax.process.precond import Meaning
from diffjax.sampling import solvers
from diffjax.sampling.solvers import Denoise, Interval, Solver, no_memory, same_for_equal
from diffjax.shapes import Samples


@same_for_equal
def consistency() -> Solver:
    """Multistep consistency sampling: `x' = a'·f(x, t) + s'·z` with fresh noise `z ~ N(0, I)`.

    `f(x, t)` is the end of the flow from `x`, so one step is a sample, and more steps correct it.
    For objectives whose prediction is the end of the flow: with a posterior mean in the place of
    `f`, samples have too little variance. Song et al. 2023 (arXiv:2303.01469), algorithm 1.
    """

    def step(denoise: Denoise, interval: Interval, memory: Any, x: Samples) -> tuple[Samples, Any]:
        end, noise = interval.end, solvers.normal(interval.keys, x.shape[1:])
        return end.mix(Pair(denoise(x, interval.t).x0, noise)), memory

    return Solver(no_memory, step, nfe=1, order=1, fresh_noise=True, needs=Meaning.END_OF_FLOW)
