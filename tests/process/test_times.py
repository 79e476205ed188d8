"""Densities over time, and the uniform numbers behind them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffjax import choices
from diffjax.process import paths, times
from diffjax.process.paths import coeffs, log_snr, log_snr_of
from diffjax.spec import build

PATHS = {name: build(spec) for name, spec in choices.PATHS.items()}
TIMES = {name: build(spec) for name, spec in choices.TIMES.items()}
UNIFORMS = {name: build(spec) for name, spec in choices.UNIFORMS.items()}
OTHERS = {
    "logit_normal_moved": times.LogitNormal(0.5, 1.2),
    "mode_to_the_ends": times.Mode(-0.8),
    "beta_pi0": times.Beta(1.5, 1.0),
    "log_normal_edm2": times.LogNormal(-0.4, 1.0),
}
# Two densities look at the path's log-SNR, the others at its ends alone.
CASES = [(density, path) for density in ("log_normal", "uniform_log_snr") for path in PATHS]
CASES += [
    (density, path)
    for density in ("uniform", "logit_normal", "mode", "cos_map", "beta", *OTHERS)
    for path in ("linear", "cosine", "edm")
]
CELLS, NODES = 64, 8
every_times = pytest.mark.parametrize("density", TIMES.values(), ids=TIMES)
every_uniforms = pytest.mark.parametrize("uniforms", UNIFORMS.values(), ids=UNIFORMS)


@pytest.mark.parametrize(("times_name", "path_name"), CASES)
def test_quantile_and_density_are_one_distribution(times_name, path_name):
    """The density, integrated up to the quantile of `u`, is `u`; and all of it is 1.

    Integrated by Gauss and Legendre's rule between 64 quantiles. The cumulative distribution is so
    checked to 1e-3, which a Kolmogorov-Smirnov test could see with a million numbers; with it all
    draws by quantile have the density.
    """
    density, path = {**TIMES, **OTHERS}[times_name], PATHS[path_name]
    u = np.linspace(0.0, 1.0, CELLS + 1)
    u[-1] = 1.0 - 2.0**-24  # the largest that is ever drawn
    ends = np.asarray(density.quantile(jnp.asarray(u, jnp.float32), path), np.float64)
    assert ends[0] >= np.float32(path.t_min)
    assert ends[-1] <= np.float32(path.t_noise)
    assert (np.diff(ends) > 0).all()
    nodes, mass = np.polynomial.legendre.leggauss(NODES)
    # Halving log time, where a cell spans decades of it: t = exp(…).
    low, high = np.log(ends[:-1, None]), np.log(ends[1:, None])
    t = np.exp(0.5 * (low + high) + 0.5 * (high - low) * nodes)
    log_density = density.log_density(jnp.asarray(t.ravel(), jnp.float32), path)
    p = np.exp(np.asarray(log_density, np.float64)).reshape(t.shape)
    cell = np.sum(0.5 * (high - low) * mass * t * p, axis=1)
    np.testing.assert_allclose(np.cumsum(cell), u[1:], atol=2e-3)


@pytest.mark.parametrize("path_name", ["ddpm_table", "cosine_table", "linear", "ddpm"])
def test_discrete_times_are_the_steps_of_the_table(path_name):
    path = PATHS[path_name]
    steps = round(1000 * float(path.t_noise))
    u = (np.arange(steps) + 0.5) / steps
    t = np.asarray(TIMES["discrete"].quantile(jnp.asarray(u, jnp.float32), path), np.float64)
    np.testing.assert_allclose(t, np.arange(1, steps + 1) / 1000, atol=1e-7)
    assert TIMES["discrete"].quantile(jnp.array([1.0]), path)[0] == np.float32(path.t_noise)
    density = np.exp(TIMES["discrete"].log_density(jnp.asarray(t), path))
    np.testing.assert_allclose(density * 1e-3 * steps, 1.0, rtol=1e-5)


@every_times
def test_draws_pass_a_kolmogorov_smirnov_test(density):
    """Through real random numbers, against the cumulative sum of the density in float64."""
    path, n = PATHS["cosine"], 2**14
    u = UNIFORMS["independent"](jax.random.key(0), n)
    t = np.asarray(density.quantile(u, path), np.float64)
    fine = np.linspace(float(path.t_min), float(path.t_noise), n + 1)
    middle = jnp.asarray(0.5 * (fine[1:] + fine[:-1]), jnp.float32)
    mass = np.exp(np.asarray(density.log_density(middle, path), np.float64))
    cdf = np.concatenate([[0.0], np.cumsum(mass * np.diff(fine))])
    assert cdf[-1] == pytest.approx(1.0, abs=2e-3)
    if density is TIMES["discrete"]:  # the histogram that its density stands for
        t = t - 1e-3 * np.random.default_rng(0).uniform(size=n)
        fine, cdf = np.array([0.0, path.t_noise]), np.array([0.0, 1.0])
    # The probability of failing by chance is 1e-4, and the key is fixed.
    assert scipy.stats.kstest(t, lambda x: np.interp(x, fine, cdf)).pvalue > 1e-4


# The papers' own distributions, from SciPy. Times are uniform ones moved to [t_min, t_noise].
SCIPY = {
    "uniform": scipy.stats.uniform(),
    "beta": scipy.stats.beta(2.0, 2.0),
    "beta_pi0": scipy.stats.beta(1.5, 1.0),
}


@pytest.mark.parametrize("name", SCIPY)
def test_quantiles_are_scipys(name):
    path = paths.Linear(t_min=0.0)
    u = np.linspace(0.001, 0.999, CELLS + 1)
    t = {**TIMES, **OTHERS}[name].quantile(jnp.asarray(u, jnp.float32), path)
    np.testing.assert_allclose(t, SCIPY[name].ppf(u), atol=2e-6)


def test_logit_normal_and_log_normal_are_normals():
    u = np.linspace(0.001, 0.999, CELLS + 1)
    t = times.LogitNormal(0.5, 1.2).quantile(jnp.asarray(u), paths.Linear(t_min=0.0))
    logit = np.log(np.asarray(t, np.float64)) - np.log1p(-np.asarray(t, np.float64))
    np.testing.assert_allclose(logit, scipy.stats.norm(0.5, 1.2).ppf(u), atol=1e-4)
    # EDM's times are its noise levels; the ends cut off 1 in 10,000.
    sigma = times.LogNormal(-1.2, 1.2).quantile(jnp.asarray(u), PATHS["edm"])
    low, high = scipy.stats.norm(-1.2, 1.2).cdf(np.log([0.002, 80.0]))
    expected = scipy.stats.norm(-1.2, 1.2).ppf(low + u * (high - low))
    np.testing.assert_allclose(np.log(sigma), expected, atol=2e-4)


def test_mode_is_equation_20_of_sd3():
    u = np.linspace(0.0, 1.0, CELLS + 1)
    published = 1 - u - 1.29 * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    t = times.Mode(1.29).quantile(jnp.asarray(1.0 - u), paths.Linear(t_min=0.0))
    np.testing.assert_allclose(t, published, atol=1e-6)


def test_cos_map_is_equation_21_of_sd3():
    u = np.linspace(0.01, 0.99, CELLS + 1)
    published = 1 - 1 / (np.tan(np.pi / 2 * u) + 1)
    t = times.CosMap().quantile(jnp.asarray(u), paths.Linear(t_min=0.0))
    np.testing.assert_allclose(t, published, atol=1e-6)


@pytest.mark.parametrize("path_name", PATHS)
def test_uniform_log_snr_is_uniform_in_log_snr(path_name):
    path = PATHS[path_name]
    u = np.linspace(0.0, 1.0, CELLS + 1)
    t = TIMES["uniform_log_snr"].quantile(jnp.asarray(u, jnp.float32), path)
    values = np.ravel(log_snr_of(coeffs(path, t, 1)))
    last = max(float(log_snr(path, jnp.asarray(path.t_noise))), -15.0)
    expected = values[0] + u * (last - values[0])
    # Near pure noise float32's steps of time are steps of log-SNR.
    np.testing.assert_allclose(values, expected, atol=2e-3)


# Uniform numbers.


@every_uniforms
@pytest.mark.parametrize("n", [7, 8])
def test_uniforms_are_uniform_at_every_place(uniforms, n):
    """Each place of the batch has a uniform marginal, or the loss would be biased."""
    u = np.asarray(
        jax.vmap(lambda key: uniforms(key, n))(jax.random.split(jax.random.key(0), 4000))
    )
    assert u.shape == (4000, n)
    assert (u >= 0.0).all()
    assert (u < 1.0).all()
    for place in range(n):  # 56 tests in all: one fails by chance in 200
        assert scipy.stats.kstest(u[:, place], "uniform").pvalue > 1e-4


@pytest.mark.parametrize("name", ["stratified", "low_discrepancy"])
@pytest.mark.parametrize("n", [7, 64])
def test_one_number_lies_in_each_stratum(name, n):
    u = np.asarray(UNIFORMS[name](jax.random.key(1), n), np.float64)
    strata = np.floor(u * n + 1e-5).astype(int)
    assert sorted(strata) == list(range(n))
    assert (np.diff(u) < 0).any()  # in no order
    if name == "low_discrepancy":
        np.testing.assert_allclose(np.diff(np.sort(u)), 1.0 / n, atol=1e-6)


def test_antithetic_numbers_come_in_pairs():
    u = np.asarray(UNIFORMS["antithetic"](jax.random.key(1), 9))
    np.testing.assert_allclose(u[0:8:2] + u[1:8:2], 1.0, atol=1e-6)


@pytest.mark.parametrize("name", ["stratified", "low_discrepancy", "antithetic"])
def test_spread_numbers_lower_the_variance_of_a_mean_and_keep_it(name):
    """On `exp(u)` over 64 examples, whose mean is `e - 1`, 1,000 times."""
    keys = jax.random.split(jax.random.key(2), 1000)
    spread, plain = (
        np.exp(jax.vmap(lambda key, draw=UNIFORMS[each]: draw(key, 64))(keys)).mean(axis=1)
        for each in (name, "independent")
    )
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
