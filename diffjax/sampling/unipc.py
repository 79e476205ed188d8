"""UniPC: a predictor, and a corrector that reuses the next step's evaluation. Zhao et al. 2023."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import jax.numpy as jnp
from jax import Array

from diffjax.kinds import Interval
from diffjax.process.paths import Path
from diffjax.sampling.adams import ends_of
from diffjax.sampling.solvers import Denoise, Solver, same_for_equal
from diffjax.shapes import OneNumber, Samples

Scale = Callable[[Array], Array]
"""The paper's `B(h)`, as a function of the negative step `-h`."""


@dataclass(frozen=True)
class BH1:
    """`B = -h`, better for few steps without guidance."""

    def __call__(self, minus_h: Array) -> Array:
        return minus_h


@dataclass(frozen=True)
class BH2:
    """`B = e^{-h} - 1`, the default of the paper and of diffusers."""

    def __call__(self, minus_h: Array) -> Array:
        return jnp.expm1(minus_h)


class _Memory(NamedTuple):
    """The last step's beginning, corrected, and the evaluations up to it, the newest first."""

    x: Array
    s: Array
    lambdas: Array
    values: Array


@same_for_equal
def unipc(
    order: Annotated[int, Interval("[1, 3]")] = 2, scale: Scale = BH2(), corrector: bool = True
) -> Solver:
    """UniPC of order 1 to 3 on x0.

    Each step first corrects `x` with the evaluation made there, then predicts the next one: one
    evaluation a step. The predictor of order 2 with `BH2` is DPM-Solver++ 2M's step. `h`, `q` and
    pure noise are as in `dpm_solver`. Zhao et al. 2023 (arXiv:2302.04867), algorithms 5 to 8.

    The first steps, with less to look back at, are of lower order: started inside the path a solver
    is of order 3 at most, without its corrector of 2, and that is what it declares.

    Args:
        order: of the predictor, once it has its history; the corrector is of one more.
        scale: `BH1()` or `BH2()`.
        corrector: False is the paper's UniP, the predictor alone, which is of its own order: 1 is
            DDIM, 2 with `BH2` is DPM-Solver++ 2M, 3 is `adams.exp_ab(3)` once it has its history.
    """

    def init(x: Array) -> _Memory:
        past = jnp.full(order, -jnp.inf)
        return _Memory(x, jnp.ones(()), past, jnp.zeros((order, *x.shape), x.dtype))

    def step(
        denoise: Denoise,
        path: Path,
        memory: _Memory,
        x: Samples,
        t: OneNumber,
        t_next: OneNumber,
        keys: Array,
    ) -> tuple[Samples, _Memory]:
        del keys
        e = ends_of(path, t, t_next)
        here = jnp.log(e.a) - jnp.log(e.s)
        x0 = denoise(x, t).x0
        if corrector:
            corrected = _move(
                memory.x, memory.s, memory.lambdas, memory.values, e.a, e.s, here, scale, order, x0
            )
            x = jnp.where(jnp.isfinite(memory.lambdas[0]), corrected, x)
        lambdas = jnp.concatenate([here[None], memory.lambdas])[:order]
        values = jnp.concatenate([x0[None], memory.values])[:order]
        there = jnp.log(e.a_next) - jnp.log(e.s_next)
        x_next = _move(x, e.s, lambdas, values, e.a_next, e.s_next, there, scale, order)
        return x_next, _Memory(x, e.s, lambdas, values)

    # A first step of order 1 is once wrong by h², one of order 2 by h³.
    return Solver(init, step, nfe=1, order=min(order + 1, 3) if corrector else min(order, 2))


def _move(
    x: Array,
    s: Array,
    lambdas: Array,
    values: Array,
    a_next: Array,
    s_next: Array,
    there: Array,
    scale: Scale,
    order: int,
    at_end: Array | None = None,
) -> Array:
    """One predictor step, or with `at_end`, x0 at the end, one corrector step."""
    known = jnp.isfinite(lambdas)
    h = jnp.where(known[0], there - lambdas[0], 1.0)
    q = jnp.where(known[0], jnp.exp(lambdas[0] - there), 0.0)
    x_next = s_next / s * x + a_next * (1.0 - q) * values[0]
    if order == 1 and at_end is None:
        return x_next
    # Where the differences are taken, in units of the step: earlier steps, and its end.
    ratios = jnp.where(known[1:], (lambdas[1:] - lambdas[0]) / h, -1.0)
    changes = [
        jnp.where(known[i], (values[i] - values[0]) / ratios[i - 1], 0.0) for i in range(1, order)
    ]
    if at_end is not None:
        ratios, changes = jnp.append(ratios, 1.0), [*changes, at_end - values[0]]
    # With less to look back at, a system of fewer equations.
    weights = jnp.zeros(len(changes))
    for used in range(1, order + 1):
        enough = known[used - 1]
        weights = jnp.where(enough, _weights(ratios, used, h, scale, order, at_end), weights)
    correction = sum(weight * change for weight, change in zip(weights, changes, strict=True))
    return x_next - jnp.where(known[0], a_next * scale(-h), 0.0) * correction


def _weights(
    ratios: Array, used: int, h: Array, scale: Scale, order: int, at_end: Array | None
) -> Array:
    """The paper's ρ, for `used` evaluations; those of unused differences are 0."""
    corrects = at_end is not None
    rows = used if corrects else used - 1
    picked = list(range(used - 1)) + ([order - 1] if corrects else [])
    if rows == 0:
        return jnp.zeros(len(ratios))
    if rows == 1:  # as the authors' code has it: what the equation gives for small steps
        solved = jnp.full(1, 0.5)
    else:
        powers = jnp.stack([ratios[jnp.asarray(picked)] ** k for k in range(rows)])
        solved = jnp.linalg.solve(powers, _right_side(-h, scale, rows))
    return jnp.zeros(len(ratios)).at[jnp.asarray(picked)].set(solved)


def _right_side(minus_h: Array, scale: Scale, rows: int) -> Array:
    """`k!·φ_{k+1}(-h)·(-h)/B(h)` for k = 1, 2, … with `φ_1 = (e^{-h} - 1)/(-h)`."""
    phi = jnp.expm1(minus_h) / minus_h - 1.0
    factorial, sides = 1.0, []
    for k in range(1, rows + 1):
        sides.append(phi * factorial / scale(minus_h))
        factorial *= k + 1
        phi = phi / minus_h - 1.0 / factorial
    return jnp.stack(sides)
