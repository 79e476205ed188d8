"""The closed forms against integrals, derivatives, conservation laws and each other, in float64."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.tree_util import register_dataclass

from diffjax.process import paths
from diffjax.process.analytic import FiniteData, Gaussian, GaussianMixture, gaussian_flow


@register_dataclass
@dataclass(frozen=True)
class VarianceExploding:
    """`a = 1`, `s = t` up to 80, as EDM has it."""

    t_min: float = 2e-3
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
MEANS = np.array([[-1.0, 0.5], [1.5, 0.0]])
COVARIANCES = np.array([[[0.3, 0.1], [0.1, 0.2]], [[0.1, -0.05], [-0.05, 0.4]]])
POINTS = np.array([[-1.0, 0.2], [0.4, 0.9], [0.6, -0.5], [1.4, 0.1]])
DATA = {
    "gaussian": lambda: Gaussian(jnp.asarray(MEANS[0]), jnp.asarray(COVARIANCES[0])),
    "mixture": lambda: GaussianMixture(
        jnp.array([0.3, 0.7]), jnp.asarray(MEANS), jnp.asarray(COVARIANCES)
    ),
    "finite": lambda: FiniteData(jnp.asarray(POINTS)),
}

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
every_data = pytest.mark.parametrize("name", DATA)


@pytest.fixture(autouse=True)
def in_float64(request):
    """Arrays of a test are float64, unless it is marked as about float32."""
    if "float32" in request.node.name:
        yield
    else:
        with jax.enable_x64(True):
            yield


def inner_times(path, n):
    """Times at equal steps in log-SNR, as far as any data of unit size matter."""
    return paths.time_of_log_snr(path, jnp.linspace(5.0, -5.0, n)).astype(jnp.result_type(float))


def noisy(data, path, n=6, seed=0):
    """`x[n, d]` from the path at `t[n]`."""
    t = inner_times(path, n)
    data_key, noise_key = jax.random.split(jax.random.key(seed))
    x0 = data.draw(data_key, n)
    return paths.mix(
        paths.coeffs(path, t, 2), paths.Pair(x0, jax.random.normal(noise_key, x0.shape))
    ), t


# Against integrals.


@every_path
@every_data
def test_moments_are_the_integrals_over_the_data(name, path):
    """One dimension: `p(x0 | x) ∝ p(x0)·N(x; a·x0, s²)`, summed in NumPy."""
    m, v, w = np.array([-1.0, 0.8]), np.array([0.2, 0.05]), np.array([0.4, 0.6])
    grid = np.linspace(-6.0, 6.0, 40_001)
    prior = {
        "gaussian": scipy.stats.norm.pdf(grid, m[0], np.sqrt(v[0])),
        "mixture": (w * scipy.stats.norm.pdf(grid[:, None], m, np.sqrt(v))).sum(1),
        "finite": np.full(2, 0.5),
    }[name]
    support = m if name == "finite" else grid
    measure = prior if name == "finite" else prior * (grid[1] - grid[0])
    data = {
        "gaussian": Gaussian(jnp.asarray(m[:1]), jnp.asarray(v[:1, None])),
        "mixture": GaussianMixture(*map(jnp.asarray, (w, m[:, None], v[:, None, None]))),
        "finite": FiniteData(jnp.asarray(m[:, None])),
    }[name]

    t = np.repeat(np.asarray(inner_times(path, 4)), 3)
    c = paths.coeffs(path, jnp.asarray(t), 1)
    a, s = np.asarray(c.a), np.asarray(c.s)
    x = np.tile([-1.5, 0.2, 1.1], 4) * np.hypot(a, s)
    joint = measure * scipy.stats.norm.pdf(x[:, None], a[:, None] * support, s[:, None])
    density = joint.sum(1)
    x0 = joint @ support / density
    variance = (joint * (support - x0[:, None]) ** 2).sum(1) / density
    velocity = np.asarray(c.da) * x0 + np.asarray(c.ds) * (x - a * x0) / s

    x, t = jnp.asarray(x)[:, None], jnp.asarray(t)
    pair = data.predict(path)(x, t, None)
    np.testing.assert_allclose(pair.x0[:, 0], x0, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(pair.eps[:, 0], (x[:, 0] - a * x0) / s, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(data.log_density(path, x, t), np.log(density), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(
        data.posterior_covariance(path, x, t)[:, 0, 0], variance, rtol=1e-6, atol=1e-9
    )
    np.testing.assert_allclose(data.velocity(path, x, t)[:, 0], velocity, rtol=1e-7, atol=1e-7)


# Against derivatives of the density.


@pytest.mark.parametrize("path_name", ["ddpm", "exploding"])
@every_data
def test_score_covariance_and_velocity_follow_from_the_density(name, path_name):
    """Tweedie's formulas of first and second order, and the continuity equation.

    `score = ∇ log p`, `Cov[x0 | x] = s²/a²·(I + s²·∇² log p)`, and
    `∂ log p/∂t + div v + v·∇ log p = 0`.
    """
    path, data = PATHS[path_name], DATA[name]()
    x, t = noisy(data, path)

    def log_density(x, t):
        return data.log_density(path, x[None], t[None])[0]

    def velocity(x, t):
        return data.velocity(path, x[None], t[None])[0]

    @jax.jit
    @jax.vmap
    def truth(x, t):
        score, rate = jax.grad(log_density, argnums=(0, 1))(x, t)
        hessian = jax.jacfwd(jax.grad(log_density))(x, t)
        return score, rate, hessian, jnp.trace(jax.jacfwd(velocity)(x, t))

    score, rate, hessian, divergence = truth(x, t)
    np.testing.assert_allclose(data.score(path, x, t), score, rtol=1e-9, atol=1e-9)
    a, s = (each[:, None, None] for each in (path.alpha(t), path.sigma(t)))
    covariance = (s / a) ** 2 * (jnp.eye(2) + s**2 * hessian)
    found = data.posterior_covariance(path, x, t)
    np.testing.assert_allclose(found, covariance, rtol=1e-7, atol=1e-9)
    assert np.linalg.eigvalsh(found).min() > -1e-12
    v = data.velocity(path, x, t)
    np.testing.assert_allclose(rate, -divergence - (v * score).sum(1), rtol=1e-8, atol=1e-8)


@every_path
def test_a_gaussian_is_what_scipy_says(path):
    data = DATA["gaussian"]()
    x, t = noisy(data, path)
    pair, covariance = data.predict(path)(x, t, None), data.posterior_covariance(path, x, t)
    log_density = data.log_density(path, x, t)
    mean, prior = MEANS[0], COVARIANCES[0]
    for i in range(len(t)):
        a, s = float(path.alpha(t[i])), float(path.sigma(t[i]))
        marginal = a**2 * prior + s**2 * np.eye(2)
        expected = scipy.stats.multivariate_normal(a * mean, marginal).logpdf(x[i])
        assert float(log_density[i]) == pytest.approx(expected, rel=1e-9)
        # The posterior's precision is the sum of the prior's and the likelihood's.
        precision = np.linalg.inv(prior) + (a / s) ** 2 * np.eye(2)
        np.testing.assert_allclose(covariance[i], np.linalg.inv(precision), rtol=1e-9)
        x0 = np.linalg.solve(precision, np.linalg.solve(prior, mean) + a / s**2 * np.asarray(x[i]))
        np.testing.assert_allclose(pair.x0[i], x0, rtol=1e-9, atol=1e-11)


@every_path
def test_finite_data_are_the_limit_of_narrow_mixtures(path):
    finite, n = DATA["finite"](), len(POINTS)
    narrow = GaussianMixture(
        jnp.full(n, 1 / n), jnp.asarray(POINTS), jnp.full((n, 1, 1), 1e-9) * jnp.eye(2)
    )
    x, t = noisy(finite, path)
    for first, second in (
        (finite.predict(path)(x, t, None), narrow.predict(path)(x, t, None)),
        (finite.score(path, x, t), narrow.score(path, x, t)),
        (finite.velocity(path, x, t), narrow.velocity(path, x, t)),
        (finite.log_density(path, x, t), narrow.log_density(path, x, t)),
        (finite.posterior_covariance(path, x, t), narrow.posterior_covariance(path, x, t)),
        (finite.flow(path, x, t, path.t_noise), narrow.flow(path, x, t, path.t_noise)),
    ):
        # An s² of 0.007 and more, next to which 1e-9 is 1.4e-7.
        for left, right in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            np.testing.assert_allclose(left, right, rtol=2e-5, atol=2e-6)


# The flow map.


@every_path
@every_data
def test_the_flow_moves_with_the_velocity_and_keeps_probability(name, path):
    """`d flow/dt = velocity(flow)` by differences, and `log p(x) = log p(flow) + log |det J|`."""
    data = DATA[name]()
    x, t_from = noisy(data, path)
    t_to = t_from[::-1]
    h = 1e-5 * t_to
    moved = data.flow(path, x, t_from, t_to)
    ahead, behind = (data.flow(path, x, t_from, t_to + step) for step in (h, -h))
    v = data.velocity(path, moved, t_to)
    np.testing.assert_allclose((ahead - behind) / (2 * h[:, None]), v, rtol=1e-5, atol=1e-6)

    side = 1e-5 * path.sigma(t_from)[:, None]
    columns = [
        (data.flow(path, x + side * e, t_from, t_to) - data.flow(path, x - side * e, t_from, t_to))
        / (2 * side)
        for e in jnp.eye(2)
    ]
    _, log_volume = np.linalg.slogdet(np.stack(columns, axis=-1))
    after = data.log_density(path, moved, t_to) + log_volume
    np.testing.assert_allclose(after, data.log_density(path, x, t_from), rtol=1e-4, atol=1e-5)


@every_path
@every_data
def test_flows_compose_and_come_back(name, path):
    data = DATA[name]()
    x, t = noisy(data, path)
    noise = data.flow(path, x, t, path.t_noise)
    back = data.flow(path, noise, path.t_noise, t)
    np.testing.assert_allclose(back, x, rtol=1e-8, atol=1e-8)
    halfway = data.flow(path, x, t, t[3])
    np.testing.assert_allclose(
        data.flow(path, halfway, t[3], path.t_noise), noise, rtol=1e-8, atol=1e-8
    )
    np.testing.assert_allclose(data.flow(path, x, t, t), x, rtol=1e-12)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0), (1.0, 0.01), (0.3, 0.31)])
@every_path
def test_the_integrated_flow_is_the_closed_one(path, start, end):
    start, end = start * path.t_noise, end * path.t_noise
    gaussian = DATA["gaussian"]()
    mixture = GaussianMixture(jnp.ones(1), gaussian.mean[None], gaussian.covariance[None])
    x = 2.0 * jax.random.normal(jax.random.key(0), (6, 2))
    closed = gaussian_flow(gaussian.mean, gaussian.covariance, path, x, start, end)
    np.testing.assert_allclose(mixture.flow(path, x, start, end), closed, rtol=1e-9, atol=1e-9)


@every_path
def test_the_flow_of_finite_data_ends_on_the_data(path):
    data = DATA["finite"]()
    noise = path.sigma(jnp.array(path.t_noise)) * jax.random.normal(jax.random.key(4), (6, 2))
    ends = np.asarray(data.flow(path, noise, path.t_noise, 0.0))
    nearest = np.abs(ends[:, None] - POINTS).max(-1)
    assert nearest.min(1).max() < 1e-9
    assert len(set(nearest.argmin(1))) > 1
    # Shortly before, each is where noise around the same point would be.
    before = data.flow(path, noise, path.t_noise, path.t_min)
    pair = data.predict(path)(before, jnp.full(6, path.t_min), None)
    np.testing.assert_allclose(pair.x0, ends, atol=1e-9)


@every_data
def test_the_average_velocity_is_the_mean_along_the_flow(name):
    data, path = DATA[name](), paths.LinearBeta()
    x, t_from = noisy(data, path)
    t_to = t_from[::-1]
    nodes, weights = np.polynomial.legendre.leggauss(48)
    mean = 0.0
    for node, weight in zip(0.5 * (nodes + 1.0), 0.5 * weights, strict=True):
        t = t_from + node * (t_to - t_from)
        mean += weight * data.velocity(path, data.flow(path, x, t_from, t), t)
    average = data.average_velocity(path, x, t_from, t_to)
    np.testing.assert_allclose(average, mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        data.average_velocity(path, x, t_from, t_from), data.velocity(path, x, t_from), rtol=1e-12
    )


@every_data
def test_mean_flow_identity(name):
    """`u = v - (t - r)·du/dt`, the derivative along the path of the flow (arXiv:2505.13447)."""
    data, path = DATA[name](), paths.Linear()
    x, t = noisy(data, path)
    r = 0.3 * t
    v = data.velocity(path, x, t)
    u, change = jax.jit(
        lambda x, t, v: jax.jvp(
            lambda x, t: data.average_velocity(path, x, t, r), (x, t), (v, jnp.ones_like(t))
        )
    )(x, t, v)
    np.testing.assert_allclose(u, v - (t - r)[:, None] * change, rtol=1e-6, atol=1e-7)


# Shapes, samples, the ends of the paths, single precision.


@every_data
def test_images_are_flat_data_in_another_shape(name):
    path, shape, flat = paths.Linear(), (2, 1, 1), DATA[name]()
    images = {
        "gaussian": lambda: Gaussian(flat.mean.reshape(shape), flat.covariance),
        "mixture": lambda: GaussianMixture(
            flat.weights, flat.means.reshape(-1, *shape), flat.covariances
        ),
        "finite": lambda: FiniteData(flat.points.reshape(-1, *shape)),
    }[name]()
    x, t = noisy(flat, path)
    square = x.reshape(-1, *shape)
    assert images.draw(jax.random.key(0), 5).shape == (5, *shape)
    for of_images, of_flat in (
        (images.predict(path)(square, t, None).x0, flat.predict(path)(x, t, None).x0),
        (images.score(path, square, t), flat.score(path, x, t)),
        (images.velocity(path, square, t), flat.velocity(path, x, t)),
        (images.flow(path, square, t, 0.5), flat.flow(path, x, t, 0.5)),
        (images.average_velocity(path, square, t, 0.5), flat.average_velocity(path, x, t, 0.5)),
    ):
        assert of_images.shape == square.shape
        np.testing.assert_allclose(of_images.reshape(-1, 2), of_flat, rtol=1e-10, atol=1e-12)
    assert images.posterior_covariance(path, square, t).shape == (6, 2, 2)
    assert images.log_density(path, square, t).shape == (6,)


@every_data
def test_samples_have_the_moments_of_the_data(name):
    n = 40_000
    x = np.asarray(DATA[name]().draw(jax.random.key(0), n))
    weights, means, covariances = {
        "gaussian": (np.ones(1), MEANS[:1], COVARIANCES[:1]),
        "mixture": (np.array([0.3, 0.7]), MEANS, COVARIANCES),
        "finite": (np.full(4, 0.25), POINTS, np.zeros((4, 2, 2))),
    }[name]
    mean = weights @ means
    spread = np.einsum("k,ki,kj->ij", weights, means - mean, means - mean)
    covariance = np.einsum("k,kij->ij", weights, covariances) + spread
    # Five standard errors of a mean of variance at most 2, and of one of its square.
    np.testing.assert_allclose(x.mean(0), mean, atol=5 * np.sqrt(2 / n))
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=5 * 3 / np.sqrt(n))


def test_a_component_may_be_a_point():
    mixture = GaussianMixture(jnp.ones(1), jnp.array([[0.3, -0.2]]), jnp.zeros((1, 2, 2)))
    np.testing.assert_array_equal(mixture.draw(jax.random.key(0), 3), np.tile([0.3, -0.2], (3, 1)))
    x, t = jnp.array([[0.5, 0.5]]), jnp.array([0.1])
    np.testing.assert_allclose(
        mixture.predict(paths.Linear())(x, t, None).x0, [[0.3, -0.2]], rtol=1e-12
    )


@every_path
@every_data
def test_float32_holds_at_both_ends(name, path):
    data = DATA[name]()
    x, _ = noisy(data, path, n=6)
    x = x * path.sigma(jnp.array(path.t_noise))
    assert x.dtype == jnp.float32
    ends = jnp.array([path.t_min, path.t_noise] * 3)
    a, s = path.alpha(ends)[:, None], path.sigma(ends)[:, None]
    x = jnp.where(s < 0.1, data.draw(jax.random.key(1), 6), x)
    pair, score = data.predict(path)(x, ends, None), data.score(path, x, ends)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), (data, x, ends))
        exact = jax.tree.map(np.asarray, wide[0].predict(path)(*wide[1:], None))
        exact_score = np.asarray(wide[0].score(path, *wide[1:]))
    # Rounding of x by 1e-7 is an error of 1e-7/s in eps and 1e-7/s² in the score.
    np.testing.assert_allclose(pair.x0, exact.x0, atol=1e-5)
    assert (np.abs(pair.eps - exact.eps) < 1e-5 + 1e-6 / s).all()
    assert (np.abs(score - exact_score) < 1e-5 + 1e-6 / s**2).all()
    assert np.isfinite(data.log_density(path, x, ends)).all()
    assert np.isfinite(data.velocity(path, x, ends)).all()
    np.testing.assert_allclose(a * pair.x0 + s * pair.eps, x, rtol=1e-5, atol=1e-5)


def test_float32_flow_is_integrated_in_float64_and_under_jit():
    path, data = paths.Linear(), DATA["mixture"]()
    x, t = noisy(data, path)
    moved = jax.jit(lambda x: data.flow(path, x, t, 1.0))(x)
    assert moved.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = data.flow(path, jnp.asarray(x, float), jnp.asarray(t, float), 1.0)
    np.testing.assert_allclose(moved, wide, rtol=3e-7, atol=3e-7)
    # A sample's flow does not depend on its batch.
    np.testing.assert_array_equal(
        data.flow(path, x[2:3], t[2:3], 1.0), data.flow(path, x, t, 1.0)[2:3]
    )


def test_float32_finite_data_never_hold_all_differences():
    batch, points, size = 32, 500, 784
    data = FiniteData(jnp.zeros((points, size)))
    x, t = jnp.zeros((batch, size)), jnp.full(batch, 0.5)
    program = jax.jit(lambda x, t: data.predict(paths.Linear())(x, t, None)).lower(x, t).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.1 * (4 * batch * points * size)
