"""Adams–Bashforth solvers: a polynomial through the last few evaluations, integrated exactly.

They differ in how the flow `dx/dt = ȧ·x0 + ṡ·eps` is written before the polynomial is inserted:

    in time      dx     = v dt              through velocities, in t        ab
    in the noise d(x/a) = eps dσ            through eps, in σ               lms
                                            through eps, in log σ           deis
                                            through eps, in time            plms
    in the data  d(x/s) = x0 e^ℓ dℓ         through x0, in ℓ                exp_ab

One evaluation per step. A step of order p uses p - 1 earlier evaluations. The first steps, which
have fewer, are of lower order, as in the papers and in all other code. Started inside the path, a
solver has order 2 at most, and this is the order that it declares, whatever p is
(docs/solvers.md). Evaluations in pure noise (`a = 0`), from where ℓ is infinitely far away, are not
used later.
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax import kinds
from diffjax.kinds import NotNegative, Positive
from diffjax.process.paths import Pair
from diffjax.sampling import solvers
from diffjax.sampling.solvers import (
    Denoise,
    End,
    Interval,
    Solver,
    same_for_equal,
    sigma_ratio,
    velocity_of,
)
from diffjax.shapes import Samples

UpToFour = Annotated[int, kinds.Range("[1, 4]")]
_NODES, _WEIGHTS = (part.astype(np.float32) for part in np.polynomial.legendre.leggauss(8))
Ends = tuple[End, End]
"""The beginning and the end of an interval."""
First = Callable[[Interval, Ends, Pair, Array], Array]
"""`(interval, its ends, prediction, x[B, …]) -> x'`: the step of order 1."""


class Form(NamedTuple):
    """A way to write the flow, `x' = first-order step + ∫ (F(u) - F(now)) weight(u) du`.

    Attributes:
        value: F, which the polynomial goes through, from the interval and the prediction.
        node: the variable u at one end, `[]`.
        weight: that of the integral, at given `u[m]`.
    """

    value: Callable[[Interval, Pair], Array]
    node: Callable[[End], Array]
    weight: Callable[[Ends, Array], Array]


def _eps(interval: Interval, pair: Pair) -> Array:
    del interval
    return pair.eps


def _velocity(interval: Interval, pair: Pair) -> Array:
    return velocity_of(interval.coeffs, pair)


def _plms_weight(ends: Ends, u: Array) -> Array:
    begin, end = ends
    return jnp.broadcast_to((end.s - begin.s * end.a / begin.a) / (end.t - begin.t), u.shape)


_TIME = Form(_velocity, lambda end: end.t, lambda ends, u: jnp.ones_like(u))
_SIGMA = Form(_eps, lambda end: end.s / end.a, lambda ends, u: jnp.broadcast_to(ends[1].a, u.shape))
_LOG_SIGMA = Form(_eps, lambda end: -end.half_log_snr, lambda ends, u: ends[1].a * jnp.exp(u))
_TIME_OF_EPS = Form(_eps, lambda end: end.t, _plms_weight)


def _half_log_snr_form(eta: float) -> Form:
    def weight(ends: Ends, u: Array) -> Array:
        _, end = ends
        to_end = end.half_log_snr - u
        return (1.0 + eta) * end.a * jnp.exp(-(1.0 + eta) * to_end)

    return Form(lambda interval, pair: pair.x0, lambda end: end.half_log_snr, weight)


@same_for_equal
def ab(order: Positive[int] = 2) -> Solver:
    """Adams–Bashforth on the velocity in the path's own time; order 1 is Euler's step.

    For steps of any lengths; on equal ones order 2 has the weights 3/2 and -1/2. Hairer, Nørsett &
    Wanner 1993, "Solving ordinary differential equations I", section III.5.

    Args:
        order: the order of a step that has its history, 2 to 4; it uses `order - 1` earlier
            evaluations.
    """

    def first(interval: Interval, ends: Ends, pair: Pair, x: Array) -> Array:
        del ends
        return x + interval.dt * _velocity(interval, pair)

    return _solver(_TIME, first, order)


@same_for_equal
def lms(order: Positive[int] = 4) -> Solver:
    """Linear multistep: eps as a polynomial in `σ = s/a`; order 1 is DDIM.

    k-diffusion's LMS, by Katherine Crowson, and the `ρAB` of DEIS, Zhang & Chen 2023
    (arXiv:2204.13902).

    Args:
        order: the order of a step that has its history; k-diffusion's default is 4.
    """
    return _solver(_SIGMA, _ddim, order)


@same_for_equal
def deis(order: Positive[int] = 3) -> Solver:
    """DEIS: eps as a polynomial in `log σ`, integrated exactly; order 1 is DDIM.

    Zhang & Chen 2023 (arXiv:2204.13902), equation 15, with log σ for their t, as in diffusers.

    Args:
        order: the order of a step that has its history; 3 is the paper's choice.
    """
    return _solver(_LOG_SIGMA, _ddim, order)


@same_for_equal
def plms(order: UpToFour = 4) -> Solver:
    """PLMS: eps as a polynomial in the path's time; DDIM's step with its mean over the step.

        x' = (a'/a)·x + (s' - s·a'/a)·ē

    On equal steps the mean ē has the published weights 55/24, -59/24, 37/24 and -9/24, the newest
    first. Here they depend on the times, so that unequal steps keep the order. It is 2, because a
    mean over time ignores that σ is not linear in time. Where it is (EDM's path) a step has order
    4. The first steps have a lower order and one evaluation each; the paper's first three are
    Runge–Kutta's. Liu et al. 2022 (arXiv:2202.09778), algorithm 2.

    Args:
        order: the number of evaluations that a step uses, 1 to 4; 4 in the paper, 1 is DDIM.
    """
    return _solver(_TIME_OF_EPS, _ddim, order)


@same_for_equal
def exp_ab(order: UpToFour = 3, eta: NotNegative[float] = 0.0) -> Solver:
    """Exponential Adams–Bashforth: x0 as a polynomial in the half-log-SNR, integrated exactly.

    Order 1 is DDIM, and order 3 is the exact form of DPM-Solver++(3M). With `eta` above 0 fresh
    noise replaces the old one at the rate `e^{-eta·ℓ}`. Then it is SA-Solver's predictor (Xue et
    al. 2023, arXiv:2309.05019, equation 14, `τ² = eta`); at order 1 with `eta = 1` it is DDPM.
    Calvo & Palencia 2006, "A class of explicit multistep exponential integrators".

    Args:
        order: 1 to 4, of a step that has its history.
        eta: 0 is the ODE, 1 adds noise as fast as DDPM.
    """

    def first(interval: Interval, ends: Ends, pair: Pair, x: Array) -> Array:
        if not eta:
            return _ddim(interval, ends, pair, x)
        z = solvers.normal(interval.keys, x.shape[1:])
        return noisy_step(ends, pair.x0, x, z, eta)

    return _solver(_half_log_snr_form(eta), first, order)._replace(fresh_noise=bool(eta))


def noisy_step(ends: Ends, x0: Array, x: Array, z: Array, eta: float) -> Array:
    """`x' = (s'/s)·q^η·x + a'·(1 - q^{1+η})·x0 + s'·√(1 - q^{2η})·z`.

    The exact solution, for constant x0, of the SDE that adds noise `eta` times as fast as DDPM.
    """
    begin, end = ends
    q = sigma_ratio(begin, end)
    kept = end.s / begin.s * q**eta * x + end.a * (1.0 - q ** (1.0 + eta)) * x0
    return kept + end.s * jnp.sqrt(1.0 - q ** (2.0 * eta)) * z


def _ddim(interval: Interval, ends: Ends, pair: Pair, x: Array) -> Array:
    del interval, x
    return ends[1].mix(pair)


def _solver(form: Form, first: First, order: int) -> Solver:
    def init(x: Array) -> tuple[Array, Array]:
        return jnp.full(order - 1, jnp.inf), jnp.zeros((order - 1, *x.shape), x.dtype)

    def step(
        denoise: Denoise, interval: Interval, memory: tuple[Array, Array], x: Samples
    ) -> tuple[Samples, tuple[Array, Array]]:
        ends = interval.begin, interval.end
        pair = denoise(x, interval.t)
        value = form.value(interval, pair)
        nodes, values = memory
        begin, end = (form.node(each) for each in ends)
        weights = _weights(form, ends, (begin, end), nodes)
        x_next = first(interval, ends, pair, x)
        x_next = x_next + jnp.tensordot(weights.astype(x.dtype), values - value[None], axes=1)
        nodes = jnp.concatenate([begin[None], nodes])[: order - 1]
        return x_next, (nodes, jnp.concatenate([value[None], values])[: order - 1])

    # The error of a first step of order 1 is h², once, whatever follows.
    return Solver(init, step, nfe=1, order=min(order, 2))


def _weights(form: Form, ends: Ends, bounds: tuple[Array, Array], past: Array) -> Array:
    """`∫ L_j(u) weight(u) du` of each earlier node's Lagrange polynomial; 0 for infinite nodes."""
    begin, end = bounds
    known = jnp.isfinite(past) & jnp.isfinite(begin)
    middle, half = 0.5 * (begin + end), 0.5 * (end - begin)
    u = jnp.where(jnp.isfinite(begin), middle + half * _NODES, end)
    nodes = jnp.concatenate([begin[None], jnp.where(known, past, 0.0)])
    used = jnp.concatenate([jnp.ones(1, bool), known])

    def one(j: int) -> Array:
        product = form.weight(ends, u)
        for m in range(len(past) + 1):
            if m != j:
                gap = jnp.where(used[m] & used[j], nodes[j] - nodes[m], 1.0)
                product = product * jnp.where(used[m], (u - nodes[m]) / gap, 1.0)
        return jnp.where(used[j], half * jnp.sum(_WEIGHTS * product), 0.0)

    return jnp.stack([one(j) for j in range(1, len(past) + 1)]) if len(past) else past
