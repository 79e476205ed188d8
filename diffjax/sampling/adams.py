"""Adams–Bashforth solvers: the velocity is a polynomial through the last few evaluations.

They differ in how the flow `dx/dt = a'·x0 + s'·eps` is written before the polynomial is put in:

    in time      dx     = (a'·x0 + s'·eps) dt       through velocities, in t        ab
    in the noise d(x/a) = eps dσ,  σ = s/a          through eps, in σ               lms
                                                    through eps, in log σ           deis
                                                    through eps, in time            plms
    in the data  d(x/s) = x0 e^λ dλ, λ = log(a/s)   through x0, in λ                exp_ab

One evaluation a step. A step of order p looks back at p - 1 earlier evaluations. The first ones,
which have fewer, are of lower order, as in the papers and in all other code: started inside the
path a solver is of order 2 at most, which is what it declares, whatever p is (docs/solvers.md).
Evaluations in pure noise (`a = 0`), from where log-SNR has infinitely far to go, are not looked
back at.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.kinds import Interval, NotNegative, Positive
from diffjax.process.paths import Pair, Path, coeffs
from diffjax.sampling import solvers
from diffjax.sampling.solvers import Denoise, Solver, same_for_equal
from diffjax.shapes import OneNumber, Samples

UpToFour = Annotated[int, Interval("[1, 4]")]
_NODES, _WEIGHTS = (part.astype(np.float32) for part in np.polynomial.legendre.leggauss(8))


class Ends(NamedTuple):
    """The path at both ends of a step, `[]` each."""

    t: Array
    a: Array
    s: Array
    t_next: Array
    a_next: Array
    s_next: Array


class Form(NamedTuple):
    """A way to write the flow, `x' = first-order step + ∫ (F(u) - F(now)) weight(u) du`.

    Attributes:
        value: what the polynomial goes through, from the coefficients and the prediction.
        node: the variable u at the beginning of a step, and at its end.
        weight: of the integral.
    """

    value: Callable[[Any, Pair], Array]
    node: Callable[[Ends], tuple[Array, Array]]
    weight: Callable[[Ends, Array], Array]


def _log_sigma(e: Ends) -> tuple[Array, Array]:
    return jnp.log(e.s) - jnp.log(e.a), jnp.log(e.s_next) - jnp.log(e.a_next)


_TIME = Form(
    lambda c, pair: c.da * pair.x0 + c.ds * pair.eps,
    lambda e: (e.t, e.t_next),
    lambda e, u: jnp.ones_like(u),
)
_SIGMA = Form(
    lambda c, pair: pair.eps,
    lambda e: (e.s / e.a, e.s_next / e.a_next),
    lambda e, u: jnp.broadcast_to(e.a_next, u.shape),
)
_LOG_SIGMA = Form(
    lambda c, pair: pair.eps,
    _log_sigma,
    lambda e, u: e.a_next * jnp.exp(u),
)
_TIME_OF_EPS = Form(
    lambda c, pair: pair.eps,
    lambda e: (e.t, e.t_next),
    lambda e, u: jnp.broadcast_to((e.s_next - e.s * e.a_next / e.a) / (e.t_next - e.t), u.shape),
)


def _log_snr_form(eta: float) -> Form:
    def weight(e: Ends, u: Array) -> Array:
        to_end = jnp.log(e.a_next) - jnp.log(e.s_next) - u  # λ' - u
        return (1.0 + eta) * e.a_next * jnp.exp(-(1.0 + eta) * to_end)

    def node(e: Ends) -> tuple[Array, Array]:
        begin, end = _log_sigma(e)
        return -begin, -end

    return Form(lambda c, pair: pair.x0, node, weight)


@same_for_equal
def ab(order: Positive[int] = 2) -> Solver:
    """Adams–Bashforth on the velocity in the path's own time; order 1 is Euler's step.

    For unequal steps; on equal ones order 2 has the weights 3/2 and -1/2. Hairer, Nørsett & Wanner
    1993, "Solving ordinary differential equations I", section III.5.
    """

    def first(e: Ends, pair: Pair, x: Array, value: Array, keys: Array) -> Array:
        del pair, keys
        return x + (e.t_next - e.t) * value

    return _solver(_TIME, first, order)


@same_for_equal
def lms(order: Positive[int] = 4) -> Solver:
    """Linear multistep: eps as a polynomial in `σ = s/a`; order 1 is DDIM.

    k-diffusion's LMS, by Katherine Crowson, and the `ρAB` of DEIS, Zhang & Chen 2023
    (arXiv:2204.13902).
    """
    return _solver(_SIGMA, _ddim, order)


@same_for_equal
def deis(order: Positive[int] = 3) -> Solver:
    """DEIS: eps as a polynomial in `log σ`, integrated exactly; order 1 is DDIM.

    Zhang & Chen 2023 (arXiv:2204.13902), equation 15, with log σ for their t, as in diffusers.
    """
    return _solver(_LOG_SIGMA, _ddim, order)


@same_for_equal
def plms(order: UpToFour = 4) -> Solver:
    """PLMS: eps as a polynomial in the path's time, its mean over the step carried by DDIM's.

    `x' = (a'/a)·x + (s' - s·a'/a)·ē`. On equal steps ē has the published weights 55/24, -59/24,
    37/24 and -9/24, the newest first; here they follow the nodes, so that unequal steps keep the
    order, which is 2: a mean over time leaves out that σ does not run evenly. Where it does (EDM's
    path) a step is of order 4. The first steps are of lower order and one evaluation each; the
    paper's first three are Runge–Kutta's. Order 1 is DDIM. Liu et al. 2022 (arXiv:2202.09778),
    algorithm 2.
    """
    return _solver(_TIME_OF_EPS, _ddim, order)


@same_for_equal
def exp_ab(order: UpToFour = 3, eta: NotNegative[float] = 0.0) -> Solver:
    """Exponential Adams–Bashforth: x0 as a polynomial in log-SNR, integrated exactly.

    Order 1 is DDIM, order 3 what DPM-Solver++(3M) sets out to be. With `eta` above 0 noise is
    added as fast as that takes to lose its memory by `e^{-eta·λ}`; then it is SA-Solver's predictor
    (Xue et al. 2023, arXiv:2309.05019, equation 14, `τ² = eta`), at order 1 DDPM for `eta = 1`.
    Calvo & Palencia 2006, "A class of explicit multistep exponential integrators".

    Args:
        order: 1 to 4, of a step that has its history.
        eta: 0 is the ODE, 1 adds noise as fast as DDPM.
    """

    def first(e: Ends, pair: Pair, x: Array, value: Array, keys: Array) -> Array:
        if not eta:
            return _ddim(e, pair, x, value, keys)
        return noisy_step(e, pair.x0, x, keys, eta)

    return _solver(_log_snr_form(eta), first, order)._replace(fresh_noise=bool(eta))


def ends_of(path: Path, t: Array, t_next: Array) -> Ends:
    """The path at both ends of a step."""
    return Ends(t, path.alpha(t), path.sigma(t), t_next, path.alpha(t_next), path.sigma(t_next))


def noisy_step(e: Ends, x0: Array, x: Array, keys: Array, eta: float) -> Array:
    """`x' = (s'/s)·q^η·x + a'·(1 - q^{1+η})·x0 + s'·√(1 - q^{2η})·z` with `q = σ'/σ`.

    The exact solution, for constant x0, of the SDE that adds noise `eta` times as fast as DDPM.
    """
    q = (e.a * e.s_next) / (e.s * e.a_next)
    z = solvers.normal(keys, x.shape[1:])
    kept = e.s_next / e.s * q**eta * x + e.a_next * (1.0 - q ** (1.0 + eta)) * x0
    return kept + e.s_next * jnp.sqrt(1.0 - q ** (2.0 * eta)) * z


def _ddim(e: Ends, pair: Pair, x: Array, value: Array, keys: Array) -> Array:
    del x, value, keys
    return e.a_next * pair.x0 + e.s_next * pair.eps


def _solver(form: Form, first: Callable[..., Array], order: int) -> Solver:
    def init(x: Array) -> tuple[Array, Array]:
        return jnp.full(order - 1, jnp.inf), jnp.zeros((order - 1, *x.shape), x.dtype)

    def step(
        denoise: Denoise,
        path: Path,
        memory: tuple[Array, Array],
        x: Samples,
        t: OneNumber,
        t_next: OneNumber,
        keys: Array,
    ) -> tuple[Samples, tuple[Array, Array]]:
        e = ends_of(path, t, t_next)
        pair = denoise(x, t)
        value = form.value(coeffs(path, t[None], x.ndim), pair)
        nodes, values = memory
        begin, end = form.node(e)
        weights = _weights(form, e, begin, end, nodes)
        x_next = first(e, pair, x, value, keys)
        x_next = x_next + jnp.tensordot(weights.astype(x.dtype), values - value[None], axes=1)
        nodes = jnp.concatenate([begin[None], nodes])[: order - 1]
        return x_next, (nodes, jnp.concatenate([value[None], values])[: order - 1])

    # A first step of order 1 is once wrong by h², whatever comes after it.
    return Solver(init, step, nfe=1, order=min(order, 2))


def _weights(form: Form, e: Ends, begin: Array, end: Array, past: Array) -> Array:
    """`∫ L_j(u) weight(u) du` of each earlier node's Lagrange polynomial; 0 for infinite nodes."""
    known = jnp.isfinite(past) & jnp.isfinite(begin)
    middle, half = 0.5 * (begin + end), 0.5 * (end - begin)
    u = jnp.where(jnp.isfinite(begin), middle + half * _NODES, end)
    nodes = jnp.concatenate([begin[None], jnp.where(known, past, 0.0)])
    used = jnp.concatenate([jnp.ones(1, bool), known])

    def one(j: int) -> Array:
        product = form.weight(e, u)
        for m in range(len(past) + 1):
            if m != j:
                gap = jnp.where(used[m] & used[j], nodes[j] - nodes[m], 1.0)
                product = product * jnp.where(used[m], (u - nodes[m]) / gap, 1.0)
        return jnp.where(used[j], half * jnp.sum(_WEIGHTS * product), 0.0)

    return jnp.stack([one(j) for j in range(1, len(past) + 1)]) if len(past) else past
