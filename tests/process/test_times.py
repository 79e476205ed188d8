"""Densities over time, and the uniform numbers behind them."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffjax import choices
from diffjax.compiling import once
from diffjax.process import times
from diffjax.process.paths import log_snr
from diffjax.process.precond import time_of
from diffjax.spec import build
from tests.support.any_path import numbered

PATHS = {name: build(spec) for name, spec in choices.PATHS.items()}
TIMES = {name: build(spec) for name, spec in choices.TIMES.items()}
UNIFORMS = {name: build(spec) for name, spec in choices.UNIFORMS.items()}
OTHERS = {
    "logit_normal_moved": times.LogitNormal(0.5, 1.2),
    "mode_to_the_ends": times.Mode(-0.8),
    "beta_pi0": times.Beta(1.5, 1.0),
    "log_normal_edm2": times.LogNormal(-0.4, 1.0),
}
DENSITIES = TIMES | OTHERS
# Two classes of densities look at the path's log-SNR, the others at its ends alone.
OF_LOG_SNR = ("log_normal", "uniform_log_snr")
SOME = numbered({name: PATHS[name] for name in ("linear", "cosine", "ddpm_table_zero_snr", "edm")})
EVERY = numbered(PATHS)
CELLS, NODES = 64, 8


# A program of each class, and not of all: JAX 0.10 takes the structures of different registered
# dataclasses for equal when they have as many fields.
@cache
def programs_of(kind):
    return (
        jax.jit(lambda density, u, path: kind.quantile(density, u, path)),
        jax.jit(lambda density, t, path: kind.log_density(density, t, path)),
    )


def programs(times_name):
    density = DENSITIES[times_name]
    return [partial(program, density) for program in programs_of(type(density))]


def assert_one_distribution(times_name, path):
    """Integrated by Gauss and Legendre's rule between 64 quantiles.

    The cumulative distribution is so checked to 1e-3, which a Kolmogorov-Smirnov test could see
    with a million numbers; with it all draws by quantile have the density.
    """
    quantile, log_density = programs(times_name)
    u = np.linspace(0.0, 1.0, CELLS + 1)
    u[-1] = 1.0 - 2.0**-24  # the largest that is ever drawn
    ends = np.asarray(quantile(np.float32(u), path), np.float64)
    assert ends[0] >= np.float32(path.t_min)
    assert ends[-1] <= np.float32(path.t_noise)
    assert (np.diff(ends) > 0).all()
    nodes, mass = np.polynomial.legendre.leggauss(NODES)
    # Halving log time, where a cell spans decades of it: t = exp(…).
    low, high = np.log(ends[:-1, None]), np.log(ends[1:, None])
    t = np.exp(0.5 * (low + high) + 0.5 * (high - low) * nodes)
    log_p = log_density(np.float32(t.ravel()), path)
    p = np.exp(np.asarray(log_p, np.float64)).reshape(t.shape)
    cell = np.sum(0.5 * (high - low) * mass * t * p, axis=1)
    np.testing.assert_allclose(np.cumsum(cell), u[1:], atol=2e-3)


@pytest.mark.parametrize("path_name", SOME)
@pytest.mark.parametrize("times_name", [name for name in DENSITIES if name != "discrete"])
def test_quantile_and_density_are_one_distribution(times_name, path_name):
    """The density, integrated up to the quantile of `u`, is `u`; and all of it is 1."""
    assert_one_distribution(times_name, SOME[path_name])


@pytest.mark.thorough
@pytest.mark.parametrize("times_name", OF_LOG_SNR)
def test_they_are_so_on_every_path(times_name):
    for path in EVERY.values():
        assert_one_distribution(times_name, path)


@pytest.mark.parametrize("path_name", ["ddpm_table", "cosine_table", "linear", "ddpm"])
def test_discrete_times_are_the_steps_of_the_table(path_name):
    path = EVERY[path_name]
    quantile, log_density = programs("discrete")
    steps = round(1000 * path.t_noise)
    # Paths of fewer steps than 1,000 get more numbers, so that there is one program for all.
    u = np.append((np.arange(steps) + 0.5) / steps, np.ones(1001 - steps))
    t = np.asarray(quantile(np.float32(u), path), np.float64)
    np.testing.assert_allclose(t[:steps], np.arange(1, steps + 1) / 1000, atol=1e-7)
    np.testing.assert_array_equal(t[steps:], np.float32(path.t_noise))
    density = np.exp(log_density(np.float32(t), path))
    np.testing.assert_allclose(density * 1e-3 * steps, 1.0, rtol=1e-5)


# The papers' own distributions, from SciPy. Times are uniform ones moved to [t_min, t_noise].
FROM_0 = replace(SOME["linear"], t_min=np.float64(0.0))
SCIPY = {
    "uniform": scipy.stats.uniform(),
    "beta": scipy.stats.beta(2.0, 2.0),
    "beta_pi0": scipy.stats.beta(1.5, 1.0),
}


@pytest.mark.parametrize("name", SCIPY)
def test_quantiles_are_scipys(name):
    u = np.linspace(0.001, 0.999, CELLS + 1)
    t = programs(name)[0](np.float32(u), FROM_0)
    # The incomplete beta function is exact to some 3e-6 in float32, the others to rounding.
    atol = 4e-6 if name.startswith("beta") else 2e-6
    np.testing.assert_allclose(t, SCIPY[name].ppf(u), atol=atol)


def test_logit_normal_and_log_normal_are_normals():
    u = np.linspace(0.001, 0.999, CELLS + 1)
    t = np.asarray(programs("logit_normal_moved")[0](np.float32(u), FROM_0), np.float64)
    logit = np.log(t) - np.log1p(-t)
    np.testing.assert_allclose(logit, scipy.stats.norm(0.5, 1.2).ppf(u), atol=1e-4)
    # EDM's times are its noise levels; the ends cut off 1 in 10,000.
    sigma = programs("log_normal")[0](np.float32(u), SOME["edm"])
    low, high = scipy.stats.norm(-1.2, 1.2).cdf(np.log([0.002, 80.0]))
    expected = scipy.stats.norm(-1.2, 1.2).ppf(low + u * (high - low))
    np.testing.assert_allclose(np.log(sigma), expected, atol=2e-4)


def test_mode_is_equation_20_of_sd3():
    u = np.linspace(0.0, 1.0, CELLS + 1)
    published = 1 - u - 1.29 * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    t = programs("mode")[0](np.float32(1.0 - u), FROM_0)
    np.testing.assert_allclose(t, published, atol=1e-6)


def test_cos_map_is_equation_21_of_sd3():
    u = np.linspace(0.01, 0.99, CELLS + 1)
    published = 1 - 1 / (np.tan(np.pi / 2 * u) + 1)
    t = programs("cos_map")[0](np.float32(u), FROM_0)
    np.testing.assert_allclose(t, published, atol=1e-6)


@once()
def log_snrs(path, t):
    return log_snr(path, t), log_snr(path, jnp.asarray(path.t_noise))


def assert_uniform_in_log_snr(path):
    u = np.linspace(0.0, 1.0, CELLS + 1)
    values, last = log_snrs(path, programs("uniform_log_snr")[0](np.float32(u), path))
    expected = values[0] + u * (max(float(last), -15.0) - values[0])
    # Near pure noise float32's steps of time are steps of log-SNR.
    np.testing.assert_allclose(values, expected, atol=2e-3)


@pytest.mark.parametrize("path_name", SOME)
def test_uniform_log_snr_is_uniform_in_log_snr(path_name):
    assert_uniform_in_log_snr(SOME[path_name])


@pytest.mark.thorough
def test_uniform_log_snr_is_so_on_every_path():
    for path in EVERY.values():
        assert_uniform_in_log_snr(path)


# Uniform numbers.


@cache
def drawn(name, n):
    """By 1,000 keys, or by 4,000 for few numbers, `[K, n]`."""
    keys = jax.random.split(jax.random.key(0), 4000 if n < 10 else 1000)
    return np.asarray(jax.jit(jax.vmap(lambda key: UNIFORMS[name](key, n)))(keys))


@pytest.mark.parametrize(("name", "n"), [*((name, 7) for name in UNIFORMS), ("antithetic", 8)])
def test_uniforms_are_uniform_at_every_place(name, n):
    """Each place of the batch has a uniform marginal, or the loss would be biased."""
    u = drawn(name, n)
    assert u.shape == (4000, n)
    assert (u >= 0.0).all()
    assert (u < 1.0).all()
    for place in range(n):  # 36 tests in all: one fails by chance in 300
        assert scipy.stats.kstest(u[:, place], "uniform").pvalue > 1e-4


def test_independent_numbers_know_nothing_of_each_other():
    u = drawn("independent", 7)
    correlations = np.corrcoef(u.T)[np.triu_indices(7, 1)]
    assert np.abs(correlations).max() < 4.5 / np.sqrt(len(u))


@pytest.mark.parametrize("name", ["stratified", "low_discrepancy"])
@pytest.mark.parametrize("n", [7, 64])
def test_one_number_lies_in_each_stratum(name, n):
    u = drawn(name, n).astype(np.float64)
    inside = n * np.sort(u) - np.arange(n)
    assert (inside > -1e-4).all()  # float32 rounds a few onto their neighbour's end
    assert (inside < 1.0 + 1e-4).all()
    # In no order: one of seven is in rising order once in 5,040 times.
    assert (np.diff(u) < 0).any(axis=1).mean() > 0.99
    if name == "low_discrepancy":
        np.testing.assert_allclose(np.diff(np.sort(u)), 1.0 / n, atol=1e-6)


def test_antithetic_numbers_come_in_pairs():
    u = drawn("antithetic", 7)
    np.testing.assert_allclose(u[:, 0:6:2] + u[:, 1:6:2], 1.0, atol=1e-6)


@pytest.mark.parametrize("name", ["stratified", "low_discrepancy", "antithetic"])
@pytest.mark.parametrize("number", [0.0, 1.0 - 2.0**-24])
def test_rounding_reaches_no_1(name, number, monkeypatch):
    """`1 - 0` and `(n - 1 + number)/n` do, by rounding; the largest float32 below is drawn then."""
    numbers = lambda key, shape=(): jnp.full(shape, number, jnp.float32)  # noqa: E731
    monkeypatch.setattr(jax.random, "uniform", numbers)
    u = np.asarray(UNIFORMS[name](jax.random.key(0), 8))
    assert (u >= 0.0).all()
    reached = number > 0.0 if name != "antithetic" else number == 0.0
    assert u.max() == np.float32(1.0 - 2.0**-24) or not reached
    assert u.max() < 1.0


@pytest.mark.parametrize("name", ["stratified", "low_discrepancy", "antithetic"])
def test_spread_numbers_lower_the_variance_of_a_mean_and_keep_it(name):
    """On `exp(u)` over 64 examples, whose mean is `e - 1`, 1,000 times."""
    spread, plain = (np.exp(drawn(each, 64)).mean(axis=1) for each in (name, "independent"))
    for means in (spread, plain):
        error = means.std() / np.sqrt(len(means))
        assert means.mean() == pytest.approx(np.e - 1.0, abs=4.5 * error + 1e-6)
    # With f = exp: Var f is (e² - 1)/2 - (e - 1)² = 0.2420, ∫f'² is 3.195, f(1) - f(0) is 1.718.
    independent = 0.2420 / 64
    expected = {
        "stratified": 3.195 / (12 * 64**3),
        "low_discrepancy": 1.718**2 / (12 * 64**2),
        # Var of (f(u) + f(1 - u))/2: half of Var f plus the covariance e - (e - 1)²
        "antithetic": 0.5 * (0.2420 + np.e - (np.e - 1) ** 2) / 32,
    }[name]
    # The variance of 1,000 normal means is known to 4.5 %.
    assert plain.var() == pytest.approx(independent, rel=0.2)
    assert spread.var() == pytest.approx(expected, rel=0.2)


def test_logit_normal_is_that_of_sd3_by_default():
    """`logit(v) ~ N(0, 1)`: one standard deviation above the median is `v = sigmoid(1)`."""
    path = build(choices.PATHS["linear"])
    found = times.LogitNormal().quantile(jnp.asarray(scipy.stats.norm.cdf([0.0, 1.0])), path)
    v = (found - path.t_min) / (path.t_noise - path.t_min)
    np.testing.assert_allclose(v, [0.5, 1 / (1 + np.exp(-1.0))], rtol=1e-5)


def test_the_time_of_an_image_is_the_first_of_two():
    pairs = np.array([[0.9, 0.1], [0.5, 0.2]], "f")
    np.testing.assert_array_equal(time_of(pairs), pairs[:, 0])
    np.testing.assert_array_equal(time_of(pairs[:, 1]), pairs[:, 1])
