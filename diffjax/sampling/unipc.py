"""UniPC: a predictor, and a corrector that reuses the evaluation of the next step.

Both are series of x0 in the half-log-SNR ℓ, with coefficients that solve a small linear system.
Zhao et al. 2023 (arXiv:2302.04867).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import jax.numpy as jnp
from jax import Array

from diffjax import kinds
from diffjax.sampling.solvers import Denoise, End, Interval, Solver, same_for_equal
from diffjax.shapes import Samples

Scale = Callable[[Array], Array]
"""The paper's `B(h)`, as a function of the negative step `-h`."""


@dataclass(frozen=True)
class BH1:
    """`B = -h`; better for few steps without guidance."""

    def __call__(self, minus_h: Array) -> Array:
        return minus_h


@dataclass(frozen=True)
class BH2:
    """`B = e^{-h} - 1`; the default of the paper and of diffusers."""

    def __call__(self, minus_h: Array) -> Array:
        return jnp.expm1(minus_h)


class _Memory(NamedTuple):
    """The corrected beginning of the last step, and the evaluations up to it, the newest first."""

    x: Array
    s: Array
    half_log_snrs: Array
    values: Array


class _Rule(NamedTuple):
    """What all steps share: the order of the predictor, and `B(h)`."""

    order: int
    scale: Scale


@same_for_equal
def unipc(
    order: Annotated[int, kinds.Range("[1, 3]")] = 2,
    scale: Scale = BH2(),
    corrector: bool = True,
) -> Solver:
    """UniPC of order 1 to 3 on x0.

    Each step first corrects `x` with the evaluation at its beginning, and then predicts the next
    one: one evaluation per step. The predictor of order 2 with `BH2` is the step of DPM-Solver++
    2M. Pure noise is treated as in `dpm_solver`. Zhao et al. 2023 (arXiv:2302.04867), algorithms 5
    to 8.

    The first steps, with fewer earlier evaluations, are of lower order. Started inside the path, a
    solver has order 3 at most, without its corrector 2, and this is the order that it declares.

    Args:
        order: that of the predictor once it has its history, 1 to 3; the corrector has one more.
            The paper uses 2 with guidance and 3 without.
        scale: `BH1()` or `BH2()`, the default of the paper.
        corrector: False is the paper's UniP, the predictor alone, with its own order: 1 is DDIM, 2
            with `BH2` is DPM-Solver++ 2M, 3 is `adams.exp_ab(3)` once it has its history.
    """
    rule = _Rule(order, scale)

    def init(x: Array) -> _Memory:
        past = jnp.full(order, -jnp.inf)
        return _Memory(x, jnp.ones(()), past, jnp.zeros((order, *x.shape), x.dtype))

    def step(
        denoise: Denoise, interval: Interval, memory: _Memory, x: Samples
    ) -> tuple[Samples, _Memory]:
        begin = interval.begin
        x0 = denoise(x, interval.t).x0
        if corrector:
            corrected = _move(rule, memory, begin, x0)
            x = jnp.where(jnp.isfinite(memory.half_log_snrs[0]), corrected, x)
        here = jnp.concatenate([begin.half_log_snr[None], memory.half_log_snrs])[:order]
        values = jnp.concatenate([x0[None], memory.values])[:order]
        memory = _Memory(x, begin.s, here, values)
        return _move(rule, memory, interval.end), memory

    # The error of a first step of order 1 is h², once; that of order 2 is h³.
    return Solver(init, step, nfe=1, order=min(order + 1, 3) if corrector else min(order, 2))


def _move(rule: _Rule, last: _Memory, end: End, at_end: Array | None = None) -> Array:
    """One predictor step; with `at_end`, x0 at the end, one corrector step."""
    past, values, there = last.half_log_snrs, last.values, end.half_log_snr
    known = jnp.isfinite(past)
    h = jnp.where(known[0], there - past[0], 1.0)
    q = jnp.where(known[0], jnp.exp(past[0] - there), 0.0)
    x_next = end.s / last.s * last.x + end.a * (1.0 - q) * values[0]
    if rule.order == 1 and at_end is None:
        return x_next
    # The places of the differences, in units of the step: earlier steps, and its end.
    ratios = jnp.where(known[1:], (past[1:] - past[0]) / h, -1.0)
    changes = [
        jnp.where(known[i], (values[i] - values[0]) / ratios[i - 1], 0.0)
        for i in range(1, rule.order)
    ]
    if at_end is not None:
        ratios, changes = jnp.append(ratios, 1.0), [*changes, at_end - values[0]]
    # With fewer earlier evaluations, a system of fewer equations.
    weights = jnp.zeros(len(changes))
    for used in range(1, rule.order + 1):
        solved = _weights(rule, ratios, used, h)
        weights = jnp.where(known[used - 1], solved, weights)
    correction = sum(weight * change for weight, change in zip(weights, changes, strict=True))
    return x_next - jnp.where(known[0], end.a * rule.scale(-h), 0.0) * correction


def _weights(rule: _Rule, ratios: Array, used: int, h: Array) -> Array:
    """The paper's ρ, for `used` evaluations; those of unused differences are 0."""
    corrects = len(ratios) == rule.order  # one difference more than the predictor has
    rows = used if corrects else used - 1
    picked = list(range(used - 1)) + ([rule.order - 1] if corrects else [])
    if rows == 0:
        return jnp.zeros(len(ratios))
    if rows == 1:  # as in the authors' code: the limit of the equation for small steps
        solved = jnp.full(1, 0.5)
    else:
        powers = jnp.stack([ratios[jnp.asarray(picked)] ** k for k in range(rows)])
        solved = jnp.linalg.solve(powers, _right_side(-h, rule.scale, rows))
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
