"""PNDM as in diffusers and Stable Diffusion: PLMS with the weights of equal steps."""

import jax
import jax.numpy as jnp
from jax import Array

from diffjax.process.paths import Pair
from diffjax.sampling.solvers import Denoise, Interval, Solver, same_for_equal
from diffjax.shapes import Samples

_WEIGHTS = (
    (1.0, 0.0, 0.0, 0.0),
    (3 / 2, -1 / 2, 0.0, 0.0),
    (23 / 12, -16 / 12, 5 / 12, 0.0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Of the newest evaluation and those before it, by the number of evaluations."""


@same_for_equal
def pndm() -> Solver:
    """PLMS whose first step is made twice, with the weights of equal steps on any grid.

        x' = (a'/a)·x + (s' - s·a'/a)·ē

    The first step is DDIM's; the mean of eps at both of its ends then makes it again, so there is
    one evaluation more than there are steps. At a time without signal (a = 0) there is no first
    term, and the step is DDIM's with the mean eps. `plms` has weights that depend on the times, and
    so keeps its order where steps are not equal, as the last one of the grid `leading`. Liu et al.
    2022 (arXiv:2202.09778), with `skip_prk_steps` of diffusers.
    """

    def init(x: Array) -> tuple[Array, Array]:
        return jnp.zeros((), jnp.int32), jnp.zeros((3, *x.shape), x.dtype)

    def step(
        denoise: Denoise, interval: Interval, memory: tuple[Array, Array], x: Samples
    ) -> tuple[Samples, tuple[Array, Array]]:
        known, earlier = memory
        begin, end = interval.begin, interval.end

        pair = denoise(x, interval.t)
        eps = pair.eps

        def towards(eps: Array) -> Array:
            # Without signal eps says nothing about x0, and the network's own is used.
            x0 = (x - begin.s * eps) / jnp.where(begin.a == 0.0, 1.0, begin.a)
            return end.mix(Pair(jnp.where(begin.a == 0.0, pair.x0, x0), eps))

        def corrected(_: None) -> Array:
            return 0.5 * (eps + denoise(towards(eps), interval.t_next).eps)

        def combined(_: None) -> Array:
            weights = jnp.asarray(_WEIGHTS, x.dtype)[jnp.minimum(known, 3)]
            return jnp.tensordot(weights, jnp.concatenate([eps[None], earlier]), axes=1)

        mean = jax.lax.cond(known == 0, corrected, combined, None)
        return towards(mean), (known + 1, jnp.concatenate([eps[None], earlier])[:3])

    return Solver(init, step, nfe=1, order=2, steps=lambda n: n + min(n, 1))
