"""Likelihoods against exact densities, entropies and probabilities in closed form."""

import itertools
import math
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.tree_util import register_dataclass

from diffjax.compiling import once
from diffjax.errors import UserError
from diffjax.likelihood.bound import (
    ContinuousTime,
    DiscreteDecoder,
    DiscreteTime,
    VariationalBound,
)
from diffjax.likelihood.dequantise import (
    bin_width,
    bits_per_dim,
    discrete_log_p,
    fit_dequantiser,
    init_dequantiser,
    level_centres,
    uniform,
    variational,
)
from diffjax.likelihood.ode import (
    HEUN,
    RK4,
    AdaptiveSteps,
    ExactTrace,
    FixedSteps,
    Hutchinson,
    OdeLogLikelihood,
)
from diffjax.oracle.analytic import GaussianMixture
from diffjax.process import paths, targets
from diffjax.process.paths import Pair, coeffs
from diffjax.process.precond import Precond, TimeLabel, denoiser
from diffjax.sampling import grids, solvers
from diffjax.training.sharding import batch_sharding, make_mesh
from tests.support.numbered_paths import numbered


@dataclass(frozen=True)
class VarianceExploding:
    """`a = 1`, `s = t`: a path whose prior is wide, not pure noise."""

    t_min: float = 0.002
    t_noise: float = 80.0

    def alpha(self, t):
        return jnp.ones_like(t)

    def sigma(self, t):
        return t


PATHS = {
    "linear": paths.Linear(),
    "cosine": paths.Cosine(),
    "ddpm": paths.LinearBeta(),
    "exploding": VarianceExploding(),
}
# One grid for all, fine enough near the data where the times span four decades.
STEPS = FixedSteps(80, grid=grids.Power(exponent=7.0))
path_of, NUMBERS = numbered(list(PATHS.values())), {name: i for i, name in enumerate(PATHS)}

MEAN = np.array([0.8, -0.5])
COVARIANCE = np.array([[0.5, 0.2], [0.2, 0.1]])


def mixture(weights, means, covariances) -> GaussianMixture:
    numbers: Any = (np.array(each, np.float32) for each in (weights, means, covariances))
    return GaussianMixture(*numbers)


GAUSSIAN = mixture([1.0], [MEAN], [COVARIANCE])
MIXTURE = mixture(
    weights=[0.3, 0.7],
    means=[[-1.0, 0.5, 0.0], [1.5, 0.0, 0.2]],
    covariances=[
        [[0.3, 0.1, 0.0], [0.1, 0.2, 0.05], [0.0, 0.05, 0.2]],
        [[0.1, -0.05, 0.0], [-0.05, 0.4, 0.1], [0.0, 0.1, 0.3]],
    ],
)


def drawn(data, n, seed):
    """Samples of a mixture, by NumPy."""
    rng = np.random.default_rng(seed)
    of = rng.choice(len(data.weights), n, p=np.asarray(data.weights, np.float64))
    factors = np.linalg.cholesky(np.asarray(data.covariances, np.float64))
    x = np.asarray(data.means)[of]
    x = x + np.einsum("nij,nj->ni", factors[of], rng.standard_normal(x.shape))
    return np.asarray(x, np.float32)


def log_density(data, x, a=1.0, s=0.0):
    """Of `a·x0 + s·eps`, by SciPy in float64."""
    normal: Any = scipy.stats.multivariate_normal
    means, covariances = (np.asarray(of, np.float64) for of in (data.means, data.covariances))
    x, noise = np.asarray(x, np.float64), s**2 * np.eye(means.shape[1])
    joint = [
        np.log(weight) + normal(a * mean, a**2 * covariance + noise).logpdf(x)
        for weight, mean, covariance in zip(
            np.asarray(data.weights, np.float64), means, covariances, strict=True
        )
    ]
    return scipy.special.logsumexp(joint, axis=0)


def ends(path):
    """a and s at `t_min` and at `t_noise`, in float64."""
    t = jnp.array([path.t_min, path.t_noise])
    return np.asarray(path.alpha(t), np.float64), np.asarray(path.sigma(t), np.float64)


def keys_for(x, seed=1):
    return jax.random.split(jax.random.key(seed), len(x))


@cache
def compiled(method, predict=None, path=None):
    """One program for all data of a shape and all paths, unless a model or a path is given."""

    @once()
    def run(data, number, x, keys) -> Any:
        on = path or path_of(number)
        return method(predict or data.predict(on), on, x, keys)

    return run


def ode(data, name, x, keys, predict=None, path=None, **options):
    program = compiled(OdeLogLikelihood(**options), predict, path)
    return jax.device_get(program(data, NUMBERS.get(name, 0), x, keys))


def bound(data, name, x, keys, predict=None, path=None, **options):
    program = compiled(VariationalBound(**options), predict, path)
    return jax.device_get(program(data, NUMBERS.get(name, 0), x, keys))


def standard_error(values):
    return float(np.std(np.asarray(values, np.float64), ddof=1)) / math.sqrt(len(values))


def density_at_t_min(data, path, x):
    """`log p(x_min) + d·log a(t_min)`, without the prior's error."""
    (a, _), (s, _) = ends(path)
    return log_density(data, a * np.asarray(x, np.float64), a, s) + x.shape[1] * np.log(a)


@pytest.mark.parametrize("name", PATHS)
def test_the_ode_gives_the_density_of_the_map_it_follows(name):
    """A Gaussian's flow is a linear map, so the model's density is known with both ends' errors.

    The prior is N(0, s²) even where `a(t_noise)` is not 0; the data end is `x_min/a(t_min)`.
    """
    path = PATHS[name]
    (a0, a1), (s0, s1) = ends(path)
    x = drawn(GAUSSIAN, 64, 0)
    eigenvalues, vectors = np.linalg.eigh(COVARIANCE)
    stretch = np.sqrt((a1**2 * eigenvalues + s1**2) / (a0**2 * eigenvalues + s0**2))
    noise = (
        a1 * MEAN + (((a0 * (np.asarray(x, np.float64) - MEAN)) @ vectors) * stretch) @ vectors.T
    )
    expected = scipy.stats.norm.logpdf(noise, scale=s1).sum(1) + np.log(stretch * a0).sum()
    result = ode(GAUSSIAN, name, x, keys_for(x), integrate=STEPS, trace=ExactTrace())
    np.testing.assert_allclose(result.log_p, expected, atol=1e-3)
    assert (result.standard_error == 0).all()
    # The error of the two ends against the density of clean data is that of docs/likelihood.md.
    assert np.abs(expected - log_density(GAUSSIAN, x)).max() < 0.05


@pytest.mark.parametrize("name", ["linear", pytest.param("exploding", marks=pytest.mark.thorough)])
def test_the_ode_knows_a_mixture_and_its_probes_know_their_error(name):
    x = drawn(MIXTURE, 512, 2)
    exact = log_density(MIXTURE, x)
    steps = FixedSteps(20) if name == "linear" else STEPS
    result = ode(MIXTURE, name, x, keys_for(x), integrate=steps, trace=Hutchinson(16))
    z = (result.log_p - exact) / result.standard_error
    assert 0.85 < np.std(z) < 1.25  # Student's t with 15 degrees: 1.07
    off = float(np.mean(result.log_p - exact))
    stated = math.sqrt(np.mean(np.square(result.standard_error)) / len(x))
    assert abs(off) < 4 * stated + 2e-3


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize(
    "trace", [Hutchinson(1), Hutchinson(2, jax.random.normal)], ids=["rademacher", "normal"]
)
def test_few_probes_are_unbiased_and_one_admits_that_it_can_not_say(trace):
    x = np.tile(drawn(MIXTURE, 1, 2), (1024, 1))
    exact = float(log_density(MIXTURE, x[:1]))
    result = ode(MIXTURE, "linear", x, keys_for(x), integrate=FixedSteps(16), trace=trace)
    assert abs(np.mean(result.log_p) - exact) < 4 * standard_error(result.log_p) + 2e-3
    assert np.isnan(result.standard_error).all() == (trace.num_probes == 1)


@pytest.mark.parametrize(("method", "order"), [(HEUN, 2), (RK4, 4)], ids=["heun", "rk4"])
def test_the_steps_have_their_order(method, order):
    path, counts = paths.Linear(t_min=0.05), {HEUN: (16, 32), RK4: (4, 8)}[method]
    x = drawn(GAUSSIAN, 64, 0)

    @jax.jit
    def estimates(x, keys):
        steps = [FixedSteps(n, method, grids.Power()) for n in counts]
        inputs = (GAUSSIAN.predict(path), path, x, keys)
        return [OdeLogLikelihood(integrate, ExactTrace())(*inputs) for integrate in steps]

    exact, errors = density_at_t_min(GAUSSIAN, path, x), []
    for n, result in zip(counts, estimates(x, keys_for(x)), strict=True):
        assert result.nfe == n * method.nfe
        errors.append(np.sqrt(np.mean((np.asarray(result.log_p, np.float64) - exact) ** 2)))
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(order, abs=0.5)


def test_adaptive_steps_meet_their_tolerance_and_count_their_evaluations():
    pytest.importorskip("diffrax")
    path, calls, x = PATHS["linear"], [], drawn(GAUSSIAN, 128, 3)
    exact = density_at_t_min(GAUSSIAN, path, x)

    def counted(x, t, cond):
        jax.debug.callback(lambda: calls.append(1))
        return GAUSSIAN.predict(path)(x, t, cond)

    @jax.jit
    def estimate(tolerance, x, keys):
        how = AdaptiveSteps(tolerance, max_steps=256)
        return OdeLogLikelihood(how, ExactTrace())(counted, path, x, keys)

    found = {}
    for tolerance in (1e-3, 1e-5):
        calls.clear()
        found[tolerance] = estimate(tolerance, x, keys_for(x))
        jax.effects_barrier()
        assert len(calls) == found[tolerance].nfe
    coarse, fine = found.values()
    errors = [np.sqrt(np.mean((result.log_p - exact) ** 2)) for result in (coarse, fine)]
    assert errors[0] < 0.05
    assert errors[1] < 1e-3
    assert fine.nfe > coarse.nfe
    few = estimate(1e-3, np.tile(x[:8], (16, 1)), keys_for(x))
    assert np.abs(few.log_p[:8] - exact[:8]).max() < 0.05  # other company, other steps
    # What float32 can't meet takes more steps than there may be.
    assert np.isnan(estimate(1e-12, x, keys_for(x)).log_p).all()


def test_without_diffrax_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    x = np.zeros((1, 3), "f")
    with pytest.raises(UserError, match=r"pip install 'diffjax\[adaptive\]'"):
        OdeLogLikelihood(AdaptiveSteps(), ExactTrace())(
            lambda x, t, cond: Pair(x, x), PATHS["linear"], x, keys_for(x)
        )


@pytest.mark.thorough
def test_a_target_changes_no_likelihood():
    target = targets.V()
    path, x = PATHS["cosine"], drawn(MIXTURE, 8, 0)

    def network(params, x, noise_label, cond, *, key=None):
        c = coeffs(path, noise_label, x.ndim)
        return targets.encode(target(c), MIXTURE.predict(path)(x, noise_label, cond))

    predict = denoiser(network, None, path, Precond(target, TimeLabel(1.0)))
    how = {"integrate": FixedSteps(16, HEUN), "trace": ExactTrace()}
    result = ode(None, "", x, keys_for(x), predict, path, **how)
    np.testing.assert_allclose(result.log_p, log_density(MIXTURE, x), atol=0.1)
    estimate = bound(None, "", x, keys_for(x), predict, path, num_times=8)
    same = bound(MIXTURE, "cosine", x, keys_for(x), num_times=8)
    np.testing.assert_allclose(estimate.log_p, same.log_p, atol=1e-2)


@cache
def _levels(time):
    """The last time, and those of all steps, of the path with this number."""

    @jax.jit
    def levels(number):
        levels, n = time.levels(path_of(number)), getattr(time, "num_steps", 2)
        return levels.last, levels.at((jnp.arange(n) + 0.5) / n)[0]

    return levels


def expected_gap(path_name, time):
    """−entropy minus the expected bound of the Gaussian, in closed form, float64.

    KL(q(x_last) ‖ prior), plus KL(posterior ‖ decoder), plus, in discrete time, the sum of the KLs
    minus their integral ½·∫ mse dλ = ½·log det ratios.
    """
    eigenvalues, path = np.linalg.eigvalsh(COVARIANCE), PATHS[path_name]
    a0, s0 = (v[0] for v in ends(path))
    last, steps = jax.device_get(_levels(time)(NUMBERS[path_name]))
    a1, s1 = float(path.alpha(last)), float(path.sigma(last))
    prior = 0.5 * a1**2 / s1**2 * (np.sum(eigenvalues) + MEAN @ MEAN)
    reconstruction = -0.5 * 2 * np.log(2 * np.pi * np.e * s0**2 / a0**2)
    snr0, snr1 = a0**2 / s0**2, a1**2 / s1**2
    if isinstance(time, DiscreteTime):
        t = jnp.asarray(steps)
        snr = (np.asarray(path.alpha(t), np.float64) / np.asarray(path.sigma(t))) ** 2
        before = np.concatenate([[snr0], snr[:-1]])
        mse = (eigenvalues / (snr[:, None] * eigenvalues + 1)).sum(1)
        diffusion = 0.5 * ((before - snr) * mse).sum()
    else:
        diffusion = 0.5 * np.log((snr0 * eigenvalues + 1) / (snr1 * eigenvalues + 1)).sum()
    entropy = 0.5 * np.log(2 * np.pi * np.e * eigenvalues).sum()
    return -entropy - (reconstruction - prior - diffusion)


TIMES = {"continuous": ContinuousTime(), "30 steps": DiscreteTime(30)}
QUICK = [("linear", "continuous"), ("linear", "30 steps"), ("exploding", "30 steps")]


@pytest.mark.parametrize(
    ("name", "time"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.thorough(tenth=False))
        for case in itertools.product(PATHS, TIMES)
    ],
)
def test_the_bound_is_a_bound_and_as_tight_as_theory_says(name, time):
    x, time = drawn(GAUSSIAN, 2048, 4), TIMES[time]
    result = bound(GAUSSIAN, name, x, keys_for(x), time=time, num_times=100)
    gap = log_density(GAUSSIAN, x) - result.log_p
    expected = expected_gap(name, time)
    assert expected > -1e-6
    assert abs(gap.mean() - expected) < 4 * standard_error(gap) + 1e-4
    assert standard_error(gap) < 0.05 * max(1, expected)


def test_more_steps_tighten_the_bound_towards_continuous_time():
    gaps = [expected_gap("linear", time) for time in (DiscreteTime(10), DiscreteTime(100))]
    assert gaps[0] > 2 * gaps[1] > 4 * expected_gap("linear", ContinuousTime()) > 0


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("method", ["ode", "continuous", "discrete"])
def test_the_mean_is_minus_the_entropy_within_the_stated_error(method):
    x = drawn(MIXTURE, 1536, 5)
    minus_entropy = log_density(MIXTURE, drawn(MIXTURE, 100_000, 6))
    if method == "ode":
        log_p = ode(MIXTURE, "ddpm", x, keys_for(x), integrate=FixedSteps(24)).log_p
    else:
        time = ContinuousTime() if method == "continuous" else DiscreteTime(1000)
        log_p = bound(MIXTURE, "ddpm", x, keys_for(x), time=time, num_times=32).log_p
    # The prior and the two ends are worth 0.005 nats on this path; 1,000 steps another 0.03.
    slack = 0.04 if method == "discrete" else 0.01
    off = float(np.mean(log_p) - np.mean(minus_entropy))
    assert abs(off) < 4 * standard_error(log_p) + slack


@register_dataclass
@dataclass(frozen=True)
class Shrunk:
    """The mixture's best denoiser with its x0 multiplied by `share`."""

    share: float

    def predict(self, path):
        def predict(x, t, cond):
            c = coeffs(path, t, x.ndim)
            x0 = self.share * MIXTURE.predict(path)(x, t, cond).x0
            return Pair(x0, (x - c.a * x0) / c.s)

        return predict


@pytest.mark.thorough
def test_a_wrong_denoiser_is_worse_and_its_bound_still_one():
    x = drawn(MIXTURE, 1024, 7)
    right, worse = (
        bound(Shrunk(share), "linear", x, keys_for(x), num_times=16).log_p for share in (1.0, 0.8)
    )
    exact = log_density(MIXTURE, x)
    assert np.mean(right - worse) > 0.5
    assert np.mean(exact - worse) > 4 * standard_error(exact - worse)


def test_a_summand_is_the_divergence_between_two_steps_of_the_sampler():
    """KL of Gaussians with DDPM's posterior variance and the means that `solvers.ddpm` takes."""
    path, time = PATHS["cosine"], DiscreteTime(8)
    x_t = jnp.array([[0.4]])

    @jax.jit
    def stepped(x0, keys):
        (t_next, t), (_, weight) = time.levels(path).at(jnp.array([3.5 / 8, 4.5 / 8]))
        eps = (x_t - path.alpha(t) * x0) / path.sigma(t)
        pair = Pair(x0 + 0 * x_t, eps)
        interval = solvers.Interval(path, t, t_next, keys)
        end = solvers.ddpm().step(lambda *_: pair, interval, (), x_t)[0][0, 0]
        return end, t_next, t, weight

    keys = keys_for(x_t)
    (one, t_next, t, weight), (other, *_) = stepped(0.7, keys), stepped(-0.2, keys)
    a, s = (np.array([f(t_next), f(t)], np.float64) for f in (path.alpha, path.sigma))
    ratio = a[1] / a[0]  # Ho et al. 2020, equation 7, with beta = 1 - ratio²
    variance = s[0] ** 2 / s[1] ** 2 * (1 - ratio**2)
    divergence = float(one - other) ** 2 / (2 * variance)
    assert float(weight) / 8 * 0.9**2 == pytest.approx(divergence, rel=1e-3)


def test_the_errors_that_the_bound_states_are_those_it_makes():
    path, x = PATHS["linear"], np.tile(np.array([[1.0, 0.3, -0.4]], "f"), (1024, 1))
    result = bound(Shrunk(1.0), "linear", x, keys_for(x), num_times=16)
    stated = np.sqrt(np.mean(result.standard_error**2))
    made = np.std(result.log_p)
    assert 0.9 * made < stated < 1.6 * made
    with pytest.raises(UserError, match="num_times=3 must be even"):
        VariationalBound(num_times=3)(MIXTURE.predict(path), path, x, keys_for(x))


def test_grey_levels_bound_their_own_probability():
    """Point masses on 8 levels: their best denoiser is exact, so what is lost is the decoder's."""
    levels, path = 8, paths.Linear(t_min=0.2)  # s/a = 0.25, a bin 0.29: the decoder has to work
    centres = np.asarray(level_centres(levels), np.float64)
    width = bin_width(levels)
    edges = np.concatenate([[-np.inf], centres[:-1] + width / 2, [np.inf]])
    pmf = np.diff(scipy.stats.norm.cdf(edges, 0.2, 0.4))
    points = GaussianMixture(
        jnp.asarray(pmf), jnp.asarray(centres)[:, None], jnp.full((levels, 1, 1), 1e-8)
    )
    k = np.random.default_rng(0).choice(levels, 8192, p=pmf)
    x = np.asarray(centres, "f")[k][:, None]
    decoder = DiscreteDecoder(levels)
    result = bound(points, "", x, keys_for(x), None, path, decoder=decoder, num_times=32)
    gap = np.log(pmf)[k] - np.asarray(result.log_p)
    # E KL(p(k | x_t) ‖ decoder), by quadrature.
    a, s = (v[0] for v in ends(path))
    grid = np.linspace(-3, 3, 6001)
    likelihood = scipy.stats.norm.pdf(grid[:, None], a * centres, s)
    marginal = likelihood @ pmf
    log_posterior = np.log(likelihood * pmf / marginal[:, None])
    log_decoder = np.log(likelihood / likelihood.sum(1, keepdims=True))
    lost = ((likelihood * pmf) * (log_posterior - log_decoder)).sum() * (grid[1] - grid[0])
    assert lost > 0.02
    assert abs(gap.mean() - lost) < 4 * standard_error(gap)
    # Decoded probabilities of one x_t sum to 1.
    values = np.asarray(centres, "f")[:, None]

    @jax.jit
    def total(values):
        c = coeffs(path, jnp.full(levels, path.t_min), 2)
        return jnp.exp(decoder(c, Pair(values, (0.31 - c.a * values) / c.s))).sum()

    assert float(total(values)) == pytest.approx(1.0, abs=1e-5)


@pytest.fixture(scope="module")
def grey():
    """Images of 2×2 independent Gaussian pixels on 16 levels, the exact `log P`, the density."""
    levels, mean, std = 16, 0.1, 0.12
    width = bin_width(levels)
    density: Any = scipy.stats.norm(mean, std)
    draws = density.rvs((4096, 2, 2, 1), random_state=np.random.default_rng(0))
    k = np.clip(np.rint((draws + 1) / width), 0, levels - 1)
    x = k * width - 1
    log_p = np.log(density.cdf(x + width / 2) - density.cdf(x - width / 2)).sum((1, 2, 3))
    flat = GaussianMixture(jnp.ones(1), jnp.full((1, 4), mean), std**2 * jnp.eye(4)[None])
    path = PATHS["linear"]

    def predict(x, t, cond):
        pair = flat.predict(path)(x.reshape(len(x), 4), t, cond)
        return Pair(pair.x0.reshape(x.shape), pair.eps.reshape(x.shape))

    return levels, jnp.asarray(x, jnp.float32), log_p, flat, predict


def test_dequantisation_bounds_the_probability_and_a_learned_one_tightens_it(grey):
    levels, x, log_p, flat, predict = grey

    @jax.jit
    def spreads(fitted, x):
        keys = keys_for(x)
        both = uniform(keys, x, levels), variational(fitted, keys, x)

        def bound(spread):
            exact = flat.log_density(
                PATHS["linear"], spread.x.reshape(len(x), 4), jnp.zeros(len(x))
            )
            return discrete_log_p(exact, spread, levels)

        return [bound(spread) for spread in both]

    def surrogate(x, keys, rows):
        return VariationalBound(num_times=2)(predict, PATHS["linear"], x, keys).log_p

    fitted, history = fit_dequantiser(
        surrogate, x[:1024], jax.random.key(0), num_steps=150, learning_rate=0.15, levels=levels
    )
    assert history.shape == (150,)
    held_out, exact = x[2048:], log_p[2048:]
    gaps = []
    for log_bound in spreads(fitted, held_out):
        gap = exact - np.asarray(log_bound)
        assert gap.mean() > -4 * standard_error(gap)
        gaps.append(gap.mean())
    assert gaps[1] < 0.5 * gaps[0]
    # Of uniform noise the gap is KL(U ‖ p within the bin), by quadrature.
    u = (np.arange(400) + 0.5) / 400 - 0.5
    width = bin_width(levels)
    points = np.asarray(held_out, np.float64)[..., None] + u * width
    inside = scipy.stats.norm.logpdf(points, 0.1, 0.12).mean(-1) + np.log(width)
    expected = np.mean(exact - inside.sum((1, 2, 3)))
    assert gaps[0] == pytest.approx(expected, rel=0.1)


def test_the_density_of_learned_noise_is_the_one_it_has():
    """Drawn noise of one pixel has the distribution whose density is stated."""
    params = jax.device_get(init_dequantiser(1, 16))
    params["level"] = np.tile(np.float32([0.7, -0.5]), (16, 1))
    x = np.full((20_000, 1, 1, 1), level_centres(16)[5])
    spread = jax.device_get(jax.jit(variational)(params, keys_for(x), x))
    u = np.asarray((spread.x - x) / bin_width(16) + 0.5, np.float64).ravel()
    assert ((u > 0) & (u < 1)).all()
    mass, edges = np.histogram(u, 20, (0, 1), density=True)
    middle = [
        np.exp(np.asarray(spread.log_q)[(low <= u) & (u < high)]).mean()
        for low, high in itertools.pairwise(edges)
    ]
    np.testing.assert_allclose(mass, middle, atol=0.1, rtol=0.1)
    assert np.exp(-spread.log_q).mean() == pytest.approx(1.0, abs=0.1)  # ∫ du


def test_bits_are_those_of_a_code():
    assert float(bits_per_dim(jnp.log(2.0) * -24.0, 3)) == pytest.approx(8.0)


CALLS = {
    "ode": OdeLogLikelihood(FixedSteps(8, HEUN), Hutchinson(1)),
    "bound": VariationalBound(num_times=8),
}


def of_a_batch(method):
    path, x = PATHS["linear"], jnp.asarray(drawn(GAUSSIAN, 16, 8))
    program = jax.jit(lambda x, keys: CALLS[method](GAUSSIAN.predict(path), path, x, keys))
    return program, x, keys_for(x)


@pytest.mark.thorough
def test_the_devices_do_not_matter():
    compiled, x, keys = of_a_batch("bound")
    alone, place = compiled(x, keys), batch_sharding(make_mesh())
    split = compiled(*(jax.device_put(array, place) for array in (x, keys)))
    assert len(split.log_p.sharding.device_set) == 8
    np.testing.assert_allclose(split.log_p, alone.log_p, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", CALLS)
def test_the_batch_does_not_matter(method):
    compiled, x, keys = of_a_batch(method)
    alone = compiled(x, keys)
    # The same rows in other places, among others.
    moved = compiled(x.at[:8].set(0.0)[::-1], keys[::-1])
    np.testing.assert_allclose(moved.log_p[:8], alone.log_p[:7:-1], rtol=1e-5, atol=1e-5)
    errors = moved.standard_error[:8], alone.standard_error[:7:-1]
    np.testing.assert_allclose(*errors, rtol=1e-3, atol=1e-5)
    # One probe admits that it can't say.
    assert np.isnan(errors).all() == (method == "ode")
