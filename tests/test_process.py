"""Paths, targets, weights and times against closed forms, numerical integrals and each other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffjax import choices
from diffjax.objectives.denoising import Denoising
from diffjax.process import analytic, paths, targets, times, weights
from diffjax.process.paths import Pair, coeffs, log_snr, mix, time_of_log_snr
from diffjax.process.precond import Precond, TimeLabel, denoiser
from diffjax.spec import build

PATHS = {name: build(spec) for name, spec in choices.PATHS.items()}
TARGETS = {name: build(spec) for name, spec in choices.TARGETS.items()}
WEIGHTS = {name: build(spec) for name, spec in choices.WEIGHTS.items()}
TIMES = {name: build(spec) for name, spec in choices.TIMES.items()}
ILLEGAL = {("linear", "noise")}
LEGAL = [pair for pair in itertools.product(PATHS, TARGETS) if pair not in ILLEGAL]

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
every_legal = pytest.mark.parametrize(("path_name", "target_name"), LEGAL)


def inner_times(path, n=33):
    return jnp.linspace(path.t_min, path.t_noise, n)


@every_path
def test_a_path_starts_clean_and_loses_signal(path):
    t = jnp.zeros(1)
    assert path.alpha(t)[0] == 1.0
    assert path.sigma(t)[0] == 0.0
    assert (np.diff(log_snr(path, inner_times(path))) < 0).all()


@every_path
def test_derivatives_match_central_differences(path):
    t = inner_times(path)[1:-1]
    c = coeffs(path, t, ndim=1)
    h = 1e-3
    for function, derivative in ((path.alpha, c.da), (path.sigma, c.ds)):
        numeric = (function(t + h) - function(t - h)) / (2 * h)
        np.testing.assert_allclose(derivative, numeric, atol=3e-3)


def test_linear_beta_is_the_limit_of_the_discrete_table():
    # Ho et al. 2020: 1,000 steps with beta from 1e-4 to 0.02, multiplied out in float64.
    kept = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
    path = paths.LinearBeta()
    steps = np.array([100, 300, 500, 1000])
    alpha = path.alpha(jnp.asarray(steps / 1000.0))
    # log(1 - b) = -b - b²/2 - …, and b <= 0.02: the logarithms differ by 1 % at most.
    np.testing.assert_allclose(np.log(alpha**2), np.log(kept[steps - 1]), rtol=0.012)
    assert np.abs(alpha**2 - kept[steps - 1]).max() < 1e-3


@pytest.mark.parametrize("name", ["cosine", "ddpm"])
def test_variance_preserving_paths_preserve_variance(name):
    path = PATHS[name]
    t = inner_times(path)
    np.testing.assert_allclose(path.alpha(t) ** 2 + path.sigma(t) ** 2, 1.0, atol=1e-6)


@every_path
def test_time_of_log_snr_inverts_log_snr(path):
    t = inner_times(path)[1:-1]
    np.testing.assert_allclose(time_of_log_snr(path, log_snr(path, t)), t, atol=2e-5)


@pytest.mark.parametrize(("path_name", "target_name"), list(itertools.product(PATHS, TARGETS)))
def test_legality_is_known_before_training(path_name, target_name):
    reason = targets.undecodable(PATHS[path_name], TARGETS[target_name])
    assert (reason is not None) == ((path_name, target_name) in ILLEGAL)


def test_the_domain_decides_legality():
    assert targets.undecodable(paths.Linear(t_noise=0.999), targets.Noise()) is None
    reason = targets.undecodable(paths.Cosine(t_noise=1.0), targets.Noise())
    assert reason is not None
    assert "t=1" in reason
    reason = targets.undecodable(paths.Linear(t_min=0.0), targets.Clean())
    assert reason is not None
    assert "sigma=0" in reason


@every_legal
def test_decoding_undoes_encoding(path_name, target_name):
    path, target = PATHS[path_name], TARGETS[target_name]
    t = inner_times(path)
    c = coeffs(path, t, ndim=2)
    x0, eps = jax.random.normal(jax.random.key(0), (2, len(t), 50))
    k = target(c)
    pair = targets.decode(c, k, targets.encode(k, Pair(x0, eps)), mix(c, Pair(x0, eps)))
    # Rounding of x_t (6e-8) is magnified by at most 1/a resp. 1/s, here at most 1,000.
    np.testing.assert_allclose(pair.x0, x0, atol=5e-3)
    np.testing.assert_allclose(pair.eps, eps, atol=5e-3)


@every_path
def test_velocity_is_the_derivative_of_x_t(path):
    t = inner_times(path)[1:-1]
    pair = Pair(*jax.random.normal(jax.random.key(1), (2, len(t), 3)))
    h = 1e-3
    ahead, behind = (mix(coeffs(path, t + step, 2), pair) for step in (h, -h))
    velocity = targets.encode(targets.Velocity()(coeffs(path, t, 2)), pair)
    np.testing.assert_allclose(velocity, (ahead - behind) / (2 * h), atol=1e-2)


def test_v_is_the_published_one():
    c = coeffs(paths.Cosine(), jnp.array([0.3]), ndim=1)
    x0, eps = jnp.array([0.7]), jnp.array([-1.1])
    v = targets.encode(targets.V()(c), Pair(x0, eps))
    angle = 0.15 * np.pi  # Salimans & Ho 2022: v = cos(angle) eps - sin(angle) x
    np.testing.assert_allclose(v, np.cos(angle) * -1.1 - np.sin(angle) * 0.7, rtol=1e-6)


@pytest.mark.parametrize(
    ("target_name", "published"),
    [
        ("noise", lambda snr: np.minimum(snr, 5) / snr),
        ("clean", lambda snr: np.minimum(snr, 5)),
        ("v", lambda snr: np.minimum(snr, 5) / (snr + 1)),
    ],
)
def test_min_snr_matches_the_paper(target_name, published):
    # Hang et al. 2023, section 3.4, on a variance-preserving path.
    path = paths.Cosine()
    c = coeffs(path, inner_times(path)[1:-1], ndim=1)
    snr = np.asarray(c.a / c.s, np.float64) ** 2
    weight = weights.MinSNR(gamma=5.0)(c, TARGETS[target_name](c))
    np.testing.assert_allclose(weight, published(snr), rtol=1e-4)


@every_path
def test_min_snr_is_one_loss_whatever_the_target(path):
    c = coeffs(path, inner_times(path)[1:-1], ndim=1)
    x0, eps, error = jnp.array(0.3), jnp.array(-0.8), 0.01
    losses = []
    for name, target in TARGETS.items():
        if (next(n for n, p in PATHS.items() if p is path), name) in ILLEGAL:
            continue
        # The same wrong x0 at the same x_t, seen from each target's space.
        k = target(c)
        wrong = Pair(x0 + error, eps - c.a * error / c.s)
        difference = targets.encode(k, wrong) - targets.encode(k, Pair(x0, eps))
        losses.append(weights.MinSNR()(c, k) * difference**2)
    for loss in losses[1:]:
        np.testing.assert_allclose(loss, losses[0], rtol=2e-2)


@pytest.mark.parametrize("density", [times.Uniform(), times.LogitNormal(0.5, 1.2)], ids=str)
@every_path
def test_times_have_the_density_they_declare(density, path):
    t = np.asarray(density(jax.random.key(0), 20_000, path), np.float64)
    assert t.min() >= path.t_min
    assert t.max() <= path.t_noise
    fine = np.linspace(path.t_min, path.t_noise, 20_001)
    middle = 0.5 * (fine[1:] + fine[:-1])
    mass = np.exp(density.log_density(jnp.asarray(middle), path)) * np.diff(fine)
    assert mass.sum() == pytest.approx(1.0, abs=1e-3)
    cdf = np.concatenate([[0.0], np.cumsum(mass)])
    # Kolmogorov-Smirnov: the probability of failing by chance is 1e-4, and the key is fixed.
    assert scipy.stats.kstest(t, lambda x: np.interp(x, fine, cdf)).pvalue > 1e-4


@pytest.fixture(scope="module")
def mixture():
    return analytic.GaussianMixture(
        weights=jnp.array([0.3, 0.7]),
        means=jnp.array([[-1.0, 0.5], [1.5, 0.0]]),
        covariances=jnp.array([[[0.3, 0.1], [0.1, 0.2]], [[0.1, -0.05], [-0.05, 0.4]]]),
    )


@every_path
def test_analytic_denoiser_is_the_posterior_mean(path):
    # One dimension, integrated on a grid in float64: E[x0 | x] = ∫ x0 p(x0) N(x; a x0, s²) / ∫ …
    w, m, v = np.array([0.4, 0.6]), np.array([-1.0, 0.8]), np.array([0.2, 0.05])
    data = analytic.GaussianMixture(*map(jnp.asarray, (w, m[:, None], v[:, None, None])))
    grid = np.linspace(-6, 6, 40_001)
    prior = (w * scipy.stats.norm.pdf(grid[:, None], m, np.sqrt(v))).sum(1)
    for t in np.asarray(inner_times(path, 5)[1:]):
        a, s = float(path.alpha(t)), float(path.sigma(t))
        for x in (-1.5, 0.2, 1.1):
            posterior = prior * scipy.stats.norm.pdf(x, a * grid, s)
            expected = (posterior * grid).sum() / posterior.sum()
            pair = data.predict(path)(jnp.array([[x]]), jnp.array([t]), None)
            np.testing.assert_allclose(pair.x0.item(), expected, atol=2e-4)
            np.testing.assert_allclose(pair.eps.item(), (x - a * expected) / s, atol=2e-4)


@every_path
def test_analytic_noise_is_the_score(path, mixture):
    # Tweedie: E[eps | x] = -s · grad log p_t(x).
    x = jax.random.normal(jax.random.key(0), (7, 2))
    t = inner_times(path, 9)[1:-1]
    score = jax.grad(lambda x: mixture.log_density(path, x, t).sum())(x)
    eps = mixture.predict(path)(x, t, None).eps
    np.testing.assert_allclose(eps, -path.sigma(t)[:, None] * score, atol=1e-4)


def test_analytic_density_integrates_to_one(mixture):
    side = jnp.linspace(-6, 6, 241)
    points = jnp.stack(jnp.meshgrid(side, side), -1).reshape(-1, 2)
    t = jnp.full(len(points), 0.4)
    density = jnp.exp(mixture.log_density(paths.Linear(), points, t))
    assert float(density.sum() * (12 / 240) ** 2) == pytest.approx(1.0, abs=1e-4)


CROSSES = [
    (path, target, weight, density)
    for (path, target), weight, density in itertools.product(LEGAL, WEIGHTS, TIMES)
]


@pytest.mark.parametrize(("path_name", "target_name", "weight_name", "times_name"), CROSSES)
def test_the_truth_is_the_minimiser(mixture, path_name, target_name, weight_name, times_name):
    """At the closed-form optimum the gradient is zero within its own Monte-Carlo error.

    The "network" is the exact prediction plus a small family of deviations, scaled by parameters
    that are 0 at the truth.
    """
    path, target = PATHS[path_name], TARGETS[target_name]
    objective = Denoising(
        path, Precond(target, TimeLabel(1.0)), WEIGHTS[weight_name], TIMES[times_name]
    )

    def apply(params, x, noise_label, cond, *, train=False, key=None):
        k = target(coeffs(path, noise_label, x.ndim))
        truth = targets.encode(k, mixture.predict(path)(x, noise_label, None))
        features = jnp.stack([jnp.ones_like(x), x, x * noise_label[:, None], jnp.tanh(x[:, ::-1])])
        return truth + jnp.tensordot(params, features, 1)

    @jax.jit
    def gradients(keys):
        def one(key):
            data_key, loss_key = jax.random.split(key)
            batch = {"image": mixture.draw(data_key, 512), "label": jnp.zeros(512, jnp.int32)}
            return jax.grad(
                lambda p: objective(apply, p, p, loss_key, batch, jnp.zeros(()))[0].mean()
            )(jnp.zeros(4))

        return jax.lax.map(one, keys)

    samples = np.asarray(gradients(jax.random.split(jax.random.key(0), 64)), np.float64)
    z = samples.mean(0) / (samples.std(0, ddof=1) / np.sqrt(len(samples)))
    # 4 components x 44 crosses: the largest |t| of 176 exceeds 4.5 by chance in under 1 %.
    assert np.abs(z).max() < 4.5


def test_a_wrong_prediction_is_not_a_minimiser(mixture):
    """The check above can fail: a truth that is 2 % off shows."""
    path = paths.Linear()
    objective = Denoising(
        path, Precond(targets.Velocity(), TimeLabel(1.0)), weights.Constant(), times.Uniform()
    )

    def apply(params, x, noise_label, cond, *, train=False, key=None):
        k = targets.Velocity()(coeffs(path, noise_label, x.ndim))
        return (0.98 + params) * targets.encode(k, mixture.predict(path)(x, noise_label, None))

    batch = {"image": mixture.draw(jax.random.key(0), 20_000), "label": jnp.zeros(20_000)}
    gradient = jax.grad(
        lambda p: objective(apply, p, p, jax.random.key(1), batch, jnp.zeros(()))[0].mean()
    )
    curvature = jax.grad(gradient)(0.0)
    assert -gradient(0.0) / curvature == pytest.approx(0.02, abs=0.01)


def test_denoiser_inverts_the_encoding_for_every_target(mixture):
    """Whatever a perfect network is trained on, samplers see the same pair."""
    path = paths.Cosine()
    x, t = jax.random.normal(jax.random.key(0), (6, 2)), inner_times(path, 8)[1:-1]
    truth = mixture.predict(path)(x, t, None)
    for target in TARGETS.values():
        k = target(coeffs(path, t, ndim=2))

        def apply(params, x, noise_label, cond, *, train=False, key=None, k=k):
            return targets.encode(k, truth)

        pair = denoiser(apply, None, path, Precond(target, TimeLabel()))(x, t, None)
        np.testing.assert_allclose(pair.x0, truth.x0, atol=1e-3)
        np.testing.assert_allclose(pair.eps, truth.eps, atol=1e-3)
