"""The closed forms against integrals, derivatives, conservation laws and each other, in float64.

All is asked through a few programs that take the data and the number of a path as arguments: one
compilation serves every path.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.tree_util import register_dataclass

from diffjax.compiling import once
from diffjax.oracle.analytic import FiniteData, Gaussian, GaussianMixture, gaussian_flow
from diffjax.process import paths
from tests.support.any_path import numbered


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


EACH: dict[str, paths.Path] = {
    "linear": paths.Linear(),
    "cosine": paths.Cosine(),
    "ddpm": paths.LinearBeta(),
    "exploding": VarianceExploding(),
}


PATHS = numbered(EACH)
# NumPy's arrays, which become float64 or float32 as the test has it.
SHARES: Any = np.array([0.3, 0.7])
MEANS: Any = np.array([[-1.0, 0.5], [1.5, 0.0]])
COVARIANCES: Any = np.array([[[0.3, 0.1], [0.1, 0.2]], [[0.1, -0.05], [-0.05, 0.4]]])
POINTS: Any = np.array([[-1.0, 0.2], [0.4, 0.9], [0.6, -0.5], [1.4, 0.1]])
DATA = {
    "gaussian": Gaussian(MEANS[0], COVARIANCES[0]),
    "mixture": GaussianMixture(SHARES, MEANS, COVARIANCES),
    "finite": FiniteData(POINTS),
}

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
every_data = pytest.mark.parametrize("name", DATA)
# Where a Gaussian is thorough: it is a mixture of one, and SciPy's values are another test.
OTHER = pytest.mark.thorough(tenth=False)
other_data = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=OTHER if name == "gaussian" else []) for name in DATA]
)


@pytest.fixture(autouse=True)
def in_float64(request):
    """Arrays of a test are float64, unless it is marked as about float32."""
    if "float32" in request.node.name:
        yield
    else:
        with jax.enable_x64(True):
            yield


class Answers(NamedTuple):
    """All exact values at `x` and one time, except for the flow."""

    x0: Any
    eps: Any
    score: Any
    velocity: Any
    covariance: Any
    log_density: Any


def _on_host(program):
    """The program's results as NumPy arrays, which no operation on them compiles anything for."""
    return lambda *inputs: jax.device_get(program(*inputs))


@_on_host
@once()
def ask(data, path, x, t):
    pair = data.predict(path)(x, t, None)
    return Answers(
        *pair[:2],
        data.score(path, x, t),
        data.velocity(path, x, t),
        data.posterior_covariance(path, x, t),
        data.log_density(path, x, t),
    )


@_on_host
@once()
def flow(data, path, x, t_from, t_to):
    return data.flow(path, x, t_from, t_to)


@_on_host
@once()
def average_velocity(data, path, x, t_from, t_to):
    return data.average_velocity(path, x, t_from, t_to)


@_on_host
@once()
def scales(path, t):
    return paths.coeffs(path, t, ndim=1)


@_on_host
@once(1)
def inner_times(path, n):
    """Times at equal steps in log-SNR, as far as any data of unit size matter."""
    return paths.time_of_log_snr(path, jnp.linspace(5.0, -5.0, n)).astype(jnp.result_type(float))


@_on_host
@once(2)
def draw(data, key, n):
    return data.draw(key, n)


def noisy(data, path, n=6):
    """`x[n, d]` from the path at `t[n]`."""
    t = inner_times(path, n)
    c = scales(path, t)
    noise = np.random.default_rng(0).standard_normal((n, 2))
    x = c.a[:, None] * draw(data, jax.random.key(0), n) + c.s[:, None] * noise
    return x.astype(t.dtype), t


# Against integrals.


@every_path
@every_data
def test_moments_are_the_integrals_over_the_data(name, path):
    """One dimension: `p(x0 | x) ∝ p(x0)·N(x; a·x0, s²)`, summed in NumPy."""
    m: Any = np.array([-1.0, 0.8])
    v: Any = np.array([0.2, 0.05])
    w: Any = np.array([0.4, 0.6])
    grid = np.linspace(-6.0, 6.0, 40_001)
    prior = {
        "gaussian": scipy.stats.norm.pdf(grid, m[0], np.sqrt(v[0])),
        "mixture": (w * scipy.stats.norm.pdf(grid[:, None], m, np.sqrt(v))).sum(1),
        "finite": np.full(2, 0.5),
    }[name]
    support = m if name == "finite" else grid
    measure = prior if name == "finite" else prior * (grid[1] - grid[0])
    data = {
        "gaussian": Gaussian(m[:1], v[:1, None]),
        "mixture": GaussianMixture(w, m[:, None], v[:, None, None]),
        "finite": FiniteData(m[:, None]),
    }[name]

    t = np.repeat(inner_times(path, 4), 3)
    _, a, s, da, ds = scales(path, t)
    x = np.tile([-1.5, 0.2, 1.1], 4) * np.hypot(a, s)
    joint = measure * scipy.stats.norm.pdf(x[:, None], a[:, None] * support, s[:, None])
    density = joint.sum(1)
    x0 = joint @ support / density
    variance = (joint * (support - x0[:, None]) ** 2).sum(1) / density
    velocity = da * x0 + ds * (x - a * x0) / s

    found = ask(data, path, x[:, None], t)
    np.testing.assert_allclose(found.x0[:, 0], x0, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.eps[:, 0], (x - a * x0) / s, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(found.log_density, np.log(density), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.covariance[:, 0, 0], variance, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.velocity[:, 0], velocity, rtol=1e-7, atol=1e-7)


# Against derivatives of the density.


@_on_host
@once()
def derivatives_of_the_density(data, path, x, t):
    """`∇ log p`, `∂ log p/∂t`, `∇² log p` and the velocity's divergence."""

    def log_density(x, t):
        return data.log_density(path, x[None], t[None])[0]

    def velocity(x, t):
        return data.velocity(path, x[None], t[None])[0]

    def one(x, t):
        score, rate = jax.grad(log_density, argnums=(0, 1))(x, t)
        hessian = jax.jacfwd(jax.grad(log_density))(x, t)
        return score, rate, hessian, jnp.trace(jax.jacfwd(velocity)(x, t))

    return jax.vmap(one)(x, t)


# Points are the limit of narrow mixtures, by a test below.
@every_path
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=OTHER if name != "mixture" else []) for name in DATA]
)
def test_score_covariance_and_velocity_follow_from_the_density(name, path):
    """Tweedie's formulas of first and second order, and the continuity equation.

    `score = ∇ log p`, `Cov[x0 | x] = s²/a²·(I + s²·∇² log p)`, and
    `∂ log p/∂t + div v + v·∇ log p = 0`.
    """
    data = DATA[name]
    x, t = noisy(data, path)
    score, rate, hessian, divergence = derivatives_of_the_density(data, path, x, t)
    found = ask(data, path, x, t)
    np.testing.assert_allclose(found.score, score, rtol=1e-9, atol=1e-9)
    a, s = (each[:, None, None] for each in scales(path, t)[1:3])
    covariance = (s / a) ** 2 * (np.eye(2) + s**2 * hessian)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-7, atol=1e-9)
    assert np.linalg.eigvalsh(found.covariance).min() > -1e-12
    v = found.velocity
    np.testing.assert_allclose(rate, -divergence - (v * score).sum(1), rtol=1e-8, atol=1e-8)


@every_path
def test_a_gaussian_is_what_scipy_says(path):
    data = DATA["gaussian"]
    x, t = noisy(data, path)
    found = ask(data, path, x, t)
    mean, prior = MEANS[0], COVARIANCES[0]
    for i, (_, a, s, _, _) in enumerate(np.transpose(scales(path, t))):
        marginal = a**2 * prior + s**2 * np.eye(2)
        expected = scipy.stats.multivariate_normal(a * mean, marginal).logpdf(x[i])
        assert found.log_density[i] == pytest.approx(expected, rel=1e-9)
        # The posterior's precision is the sum of the prior's and the likelihood's.
        precision = np.linalg.inv(prior) + (a / s) ** 2 * np.eye(2)
        np.testing.assert_allclose(found.covariance[i], np.linalg.inv(precision), rtol=1e-9)
        x0 = np.linalg.solve(precision, np.linalg.solve(prior, mean) + a / s**2 * x[i])
        np.testing.assert_allclose(found.x0[i], x0, rtol=1e-9, atol=1e-11)


@every_path
def test_finite_data_are_the_limit_of_narrow_mixtures(path):
    finite, n = DATA["finite"], len(POINTS)
    share: Any = np.full(n, 1 / n)
    narrow = GaussianMixture(share, POINTS, np.full((n, 1, 1), 1e-9) * np.eye(2))
    x, t = noisy(finite, path)
    ones = np.ones_like(t)
    first, second = (
        [*ask(data, path, x, t), flow(data, path, x, t, path.t_noise * ones)]
        for data in (finite, narrow)
    )
    # An s² of 0.007 and more, next to which 1e-9 is 1.4e-7.
    for left, right in zip(first, second, strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-5, atol=2e-6)


@once()
def responsibilities(data, path, x, t):
    return data.responsibilities(path, x, t)


def test_responsibilities_are_bayes_rule():
    data, path = DATA["mixture"], PATHS["ddpm"]
    x, t = noisy(data, path)
    found = responsibilities(data, path, x, t)
    for i, (_, a, s, _, _) in enumerate(np.transpose(scales(path, t))):
        joint = [
            share * scipy.stats.multivariate_normal(a * m, a**2 * c + s**2 * np.eye(2)).pdf(x[i])
            for share, m, c in zip(SHARES, MEANS, COVARIANCES, strict=True)
        ]
        np.testing.assert_allclose(found[i], np.array(joint) / np.sum(joint), rtol=1e-9)


# The flow map.


@every_path
@every_data
def test_the_flow_moves_with_the_velocity_and_keeps_probability(name, path):
    """`d flow/dt = velocity(flow)` by differences, and `log p(x) = log p(flow) + log |det J|`."""
    data = DATA[name]
    x, t_from = noisy(data, path)
    t_to = t_from[::-1]
    h = 1e-5 * t_to
    moved = flow(data, path, x, t_from, t_to)
    ahead, behind = (flow(data, path, x, t_from, t_to + step) for step in (h, -h))
    there = ask(data, path, moved, t_to)
    slope = (ahead - behind) / (2 * h[:, None])
    np.testing.assert_allclose(slope, there.velocity, rtol=1e-5, atol=1e-6)

    side = 1e-5 * scales(path, t_from).s[:, None]
    columns = [
        (ahead - behind) / (2 * side)
        for ahead, behind in (
            [flow(data, path, x + sign * side * e, t_from, t_to) for sign in (1.0, -1.0)]
            for e in np.eye(2)
        )
    ]
    _, log_volume = np.linalg.slogdet(np.stack(columns, axis=-1))
    before = ask(data, path, x, t_from).log_density
    np.testing.assert_allclose(there.log_density + log_volume, before, rtol=1e-4, atol=1e-5)


@every_path
@every_data
def test_flows_compose_and_come_back(name, path):
    data = DATA[name]
    x, t = noisy(data, path)
    end, middle = np.full_like(t, path.t_noise), np.full_like(t, t[3])
    noise = flow(data, path, x, t, end)
    back = flow(data, path, noise, end, t)
    np.testing.assert_allclose(back, x, rtol=1e-8, atol=1e-8)
    halfway = flow(data, path, x, t, middle)
    np.testing.assert_allclose(flow(data, path, halfway, middle, end), noise, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(flow(data, path, x, t, t), x, rtol=1e-12)


def test_a_flow_takes_one_time_for_all_or_one_for_each():
    data, path = DATA["mixture"], EACH["linear"]
    x, t = noisy(data, PATHS["linear"])
    each = flow(data, PATHS["linear"], x, np.full_like(t, 0.8), np.full_like(t, 0.1))
    np.testing.assert_allclose(data.flow(path, x, 0.8, 0.1), each, rtol=1e-12, atol=1e-12)


@once()
def flow_of_a_gaussian(data, path, x, t_from, t_to):
    return gaussian_flow(data.mean, data.covariance, path, x, t_from, t_to)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0), (1.0, 0.01), (0.3, 0.31)])
@every_path
def test_the_integrated_flow_is_the_closed_one(path, start, end):
    start, end = (np.full(6, share * path.t_noise) for share in (start, end))
    gaussian = DATA["gaussian"]
    one: Any = np.ones(1)
    mixture = GaussianMixture(one, gaussian.mean[None], gaussian.covariance[None])
    x = 2.0 * np.random.default_rng(0).standard_normal((6, 2))
    closed = flow_of_a_gaussian(gaussian, path, x, start, end)
    np.testing.assert_allclose(flow(mixture, path, x, start, end), closed, rtol=1e-9, atol=1e-9)


@every_path
def test_the_flow_of_finite_data_ends_on_the_data(path):
    data = DATA["finite"]
    start = np.full(6, path.t_noise)
    noise = scales(path, start).s[:, None] * np.random.default_rng(4).standard_normal((6, 2))
    ends = flow(data, path, noise, start, np.zeros(6))
    nearest = np.abs(ends[:, None] - POINTS).max(-1)
    assert nearest.min(1).max() < 1e-9
    assert len(set(nearest.argmin(1))) > 1
    # Shortly before, each is where noise around the same point would be.
    last = np.full(6, path.t_min)
    before = flow(data, path, noise, start, last)
    np.testing.assert_allclose(ask(data, path, before, last).x0, ends, atol=1e-9)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=OTHER if name != "mixture" else []) for name in DATA]
)
def test_the_average_velocity_is_the_mean_along_the_flow(name):
    data, path = DATA[name], PATHS["ddpm"]
    x, t_from = noisy(data, path)
    t_to = t_from[::-1]
    nodes, weights = np.polynomial.legendre.leggauss(48)
    mean = 0.0
    for node, weight in zip(0.5 * (nodes + 1.0), 0.5 * weights, strict=True):
        t = t_from + node * (t_to - t_from)
        mean += weight * ask(data, path, flow(data, path, x, t_from, t), t).velocity
    average = average_velocity(data, path, x, t_from, t_to)
    np.testing.assert_allclose(average, mean, rtol=1e-5, atol=1e-5)
    now = ask(data, path, x, t_from).velocity
    np.testing.assert_allclose(average_velocity(data, path, x, t_from, t_from), now, rtol=1e-12)


@_on_host
def test_a_predictor_of_two_times_steps_to_the_second_along_the_flow():
    path, x = paths.Linear(), jnp.array([[0.5, -0.2], [1.0, 0.3]])
    data = Gaussian(jnp.array([0.4, -0.2]), jnp.array([[0.5, 0.3], [0.3, 0.4]]))
    predict = jax.jit(lambda x, t: data.predict(path)(x, t, None))
    for t, r in ((0.9, 0.2), (0.6, 0.5)):
        pair = predict(x, jnp.tile(jnp.array([t, r]), (2, 1)))
        arrived = x - (t - r) * (pair.eps - pair.x0)
        np.testing.assert_allclose(arrived, data.flow(path, x, t, r), rtol=1e-4, atol=1e-5)


@once()
def average_velocity_and_change(data, path, x, t, r, v):
    def average(x, t):
        return data.average_velocity(path, x, t, r)

    return jax.jvp(average, (x, t), (v, jnp.ones_like(t)))


@pytest.mark.parametrize(
    "name", ["mixture", *(pytest.param(name, marks=OTHER) for name in ("gaussian", "finite"))]
)
def test_mean_flow_identity(name):
    """`u = v - (t - r)·du/dt`, the derivative along the path of the flow (arXiv:2505.13447)."""
    data, path = DATA[name], PATHS["linear"]
    x, t = noisy(data, path)
    r = 0.3 * t
    v = ask(data, path, x, t).velocity
    u, change = average_velocity_and_change(data, path, x, t, r, v)
    np.testing.assert_allclose(u, v - (t - r)[:, None] * change, rtol=1e-6, atol=1e-7)


# Shapes, samples, the ends of the paths, single precision.


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=OTHER if name != "mixture" else []) for name in DATA]
)
def test_images_are_flat_data_in_another_shape(name):
    path, shape, flat = PATHS["linear"], (2, 1, 1), DATA[name]
    images = {
        "gaussian": lambda: Gaussian(flat.mean.reshape(shape), flat.covariance),
        "mixture": lambda: GaussianMixture(
            flat.weights, flat.means.reshape(-1, *shape), flat.covariances
        ),
        "finite": lambda: FiniteData(flat.points.reshape(-1, *shape)),
    }[name]()
    x, t = noisy(flat, path)
    square, half = x.reshape(-1, *shape), np.full_like(t, 0.5)
    assert draw(images, jax.random.key(0), 6).shape == (6, *shape)
    of_images, of_flat = ask(images, path, square, t), ask(flat, path, x, t)
    assert of_images.covariance.shape == (6, 2, 2)
    assert of_images.log_density.shape == (6,)
    inputs_of_both = (images, path, square, t, half), (flat, path, x, t, half)
    for one, other in (
        *zip(of_images[:4], of_flat[:4], strict=True),
        # With it the flow, of which it is the difference.
        [average_velocity(*inputs) for inputs in inputs_of_both],
    ):
        assert one.shape == square.shape
        np.testing.assert_allclose(one.reshape(-1, 2), other, rtol=1e-10, atol=1e-12)


@every_data
def test_samples_have_the_moments_of_the_data(name):
    n = 40_000
    x = draw(DATA[name], jax.random.key(0), n)
    weights, means, covariances = {
        "gaussian": (np.ones(1), MEANS[:1], COVARIANCES[:1]),
        "mixture": (SHARES, MEANS, COVARIANCES),
        "finite": (np.full(4, 0.25), POINTS, np.zeros((4, 2, 2))),
    }[name]
    mean = weights @ means
    spread = np.einsum("k,ki,kj->ij", weights, means - mean, means - mean)
    covariance = np.einsum("k,kij->ij", weights, covariances) + spread
    # Five standard errors of a mean of variance at most 2, and of one of its square.
    np.testing.assert_allclose(x.mean(0), mean, atol=5 * np.sqrt(2 / n))
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=5 * 3 / np.sqrt(n))


def test_a_component_may_be_a_point():
    one: Any = np.ones(1)
    mean: Any = np.array([[0.3, -0.2]])
    covariance: Any = np.zeros((1, 2, 2))
    mixture = GaussianMixture(one, mean, covariance)
    np.testing.assert_array_equal(draw(mixture, jax.random.key(0), 6), np.tile(mean, (6, 1)))
    found = ask(mixture, PATHS["linear"], np.full((6, 2), 0.5), np.full(6, 0.1))
    np.testing.assert_allclose(found.x0, np.tile(mean, (6, 1)), rtol=1e-12)


@every_path
@other_data
def test_float32_holds_at_both_ends(name, path):
    data = DATA[name]
    x, _ = noisy(data, path)
    ends = np.array([path.t_min, path.t_noise] * 3, np.float32)
    a, s = (each[:, None] for each in scales(path, ends)[1:3])
    x = np.where(s < 0.1, draw(data, jax.random.key(1), 6), x * s[1])
    assert x.dtype == np.float32
    found = ask(data, path, x, ends)
    with jax.enable_x64(True):
        # Of the same numbers: those of the data are rounded as the float32 ones are.
        wide = jax.tree.map(lambda leaf: np.float64(np.float32(leaf)), (data, x, ends))
        exact = ask(wide[0], path, *wide[1:])
    # Rounding of x by 1e-7 is an error of 1e-7/s in eps and 1e-7/s² in the score.
    np.testing.assert_allclose(found.x0, exact.x0, atol=1e-5)
    assert (np.abs(found.eps - exact.eps) < 1e-5 + 1e-6 / s).all()
    assert (np.abs(found.score - exact.score) < 1e-5 + 1e-6 / s**2).all()
    assert np.isfinite(found.log_density).all()
    assert np.isfinite(found.velocity).all()
    np.testing.assert_allclose(a * found.x0 + s * found.eps, x, rtol=1e-5, atol=1e-5)


def test_float32_flow_is_integrated_in_float64_and_under_jit():
    path, data = PATHS["linear"], DATA["mixture"]
    x, t = noisy(data, path)
    end = np.ones_like(t)
    moved = flow(data, path, x, t, end)
    assert moved.dtype == np.float32
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.float64(np.float32(leaf)), (data, x, t, end))
        exact = flow(wide[0], path, *wide[1:])
    np.testing.assert_allclose(moved, exact, rtol=3e-7, atol=3e-7)
    # A sample's flow does not depend on its batch.
    alone = flow(data, path, x[2:3], t[2:3], end[2:3])
    np.testing.assert_array_equal(alone, moved[2:3])


def test_float32_finite_data_never_hold_all_differences():
    batch, points, size = 32, 500, 784
    data = FiniteData(jnp.zeros((points, size)))
    x, t = jnp.zeros((batch, size)), jnp.full(batch, 0.5)
    program = jax.jit(lambda x, t: data.predict(paths.Linear())(x, t, None)).lower(x, t).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.1 * (4 * batch * points * size)
