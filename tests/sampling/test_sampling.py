"""Solvers, grids and guidance against exact flows, exact moments and counted calls."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import choices
from diffjax.process import analytic, paths
from diffjax.process.paths import Pair
from diffjax.process.precond import Precond, TimeLabel, denoiser
from diffjax.process.targets import Clean
from diffjax.sampling import grids, solvers
from diffjax.sampling.guidance import Models, guide
from diffjax.sampling.sample import (
    Recipe,
    count_padded,
    draw,
    integrate,
    padded,
    sample,
    sample_padded,
    trace,
)
from diffjax.spec import build
from tests.support.compiling import FAST

PATHS = {name: build(spec) for name, spec in choices.PATHS.items()}
SOLVERS = {name: build(spec) for name, spec in choices.SOLVERS.items()}
GRIDS = {name: build(spec) for name, spec in choices.GRIDS.items()}
DETERMINISTIC = ["ddim", "euler", "heun"]
# Between the entries of a table the velocity has corners: no order above 1 can be expected.
SMOOTH = {name: path for name, path in PATHS.items() if "table" not in name}
BASIC = {name: PATHS[name] for name in ("linear", "cosine", "ddpm")}

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)

MEAN = jnp.array([0.8, -0.5])
COVARIANCE = jnp.array([[0.5, 0.2], [0.2, 0.3]])
GAUSSIAN = analytic.Gaussian(MEAN, COVARIANCE)


def bound(predict):
    return lambda x, t: predict(x, jnp.broadcast_to(t, (len(x), *t.shape)), None)


def with_variance(predict):
    """A model that also says what DDPM's variance is to be."""
    return lambda *inputs: predict(*inputs)._replace(share=jnp.full_like(inputs[0], 0.3))


@pytest.mark.parametrize("path", SMOOTH.values(), ids=SMOOTH)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_error_falls_with_the_declared_order(name, path):
    solver = SOLVERS[name]
    x = jax.random.normal(jax.random.key(0), (16, 2))
    # Over the same noise levels on every path, which is 0.73 to 0.27 on the linear one.
    t_from, t_to = (float(paths.time_of_log_snr(path, jnp.float32(x))) for x in (-2.0, 2.0))
    exact = analytic.gaussian_flow(MEAN, COVARIANCE, path, x, t_from, t_to)
    errors = []
    counts = (16, 32, 64)
    for n in counts:
        grid = jnp.linspace(t_from, t_to, n + 1)
        keys = jax.random.split(jax.random.key(1), len(x))
        end = integrate(bound(GAUSSIAN.predict(path)), solver, path, grid, keys, x)
        errors.append(float(jnp.sqrt(jnp.mean((end - exact) ** 2))))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(solver.order, abs=0.25)


@every_path
def test_the_exact_flow_maps_the_marginals_onto_each_other(path):
    # Independent of the flow's formula: mean a·m and covariance a²C + s²I at either end.
    t_from, t_to = (float(paths.time_of_log_snr(path, jnp.float32(x))) for x in (-2.8, 2.8))
    a, s = path.alpha(jnp.array([t_from, t_to])), path.sigma(jnp.array([t_from, t_to]))
    marginals = [a[i] ** 2 * COVARIANCE + s[i] ** 2 * jnp.eye(2) for i in range(2)]
    factor = np.linalg.cholesky(marginals[0])
    corners = np.concatenate([factor.T, -factor.T]) + a[0] * MEAN  # mean and covariance are exact
    moved = analytic.gaussian_flow(MEAN, COVARIANCE, path, jnp.asarray(corners), t_from, t_to)
    np.testing.assert_allclose(moved.mean(0), a[1] * MEAN, atol=1e-5)
    centred = moved - moved.mean(0)
    np.testing.assert_allclose(centred.T @ centred / 2, marginals[1], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "path_name", "grid"),
    [(name, "linear", grids.Power()) for name in SOLVERS]
    + [(name, path_name, grids.Power()) for name in ("ddpm", "unipc") for path_name in BASIC]
    + [("ddim", path_name, grids.UniformLogSNR()) for path_name in PATHS if path_name not in BASIC],
)
def test_samples_have_the_exact_moments(name, path_name, grid):
    n, path = 20_000, PATHS[path_name]
    keys = jax.random.split(jax.random.key(0), n)
    times, predict = Recipe(SOLVERS[name], grid, 400).times(path), GAUSSIAN.predict(path)
    walk = partial(draw, with_variance(predict), path, SOLVERS[name], times)
    program = jax.jit(lambda keys: walk(keys, None, (2,)), compiler_options=FAST)
    samples = np.asarray(program(keys), np.float64)
    # The statistical errors are 0.005 (mean) and 0.005 (variance). DDPM's variance is 10 % short
    # at 100 steps and, being of first order, 2.5 % (0.012) at 400.
    mean, covariance = where_the_prior_goes(path)
    np.testing.assert_allclose(samples.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(np.cov(samples.T), covariance, atol=0.03)


def where_the_prior_goes(path):
    """Sampling starts from noise without the last signal: 0.07 of it on Stable Diffusion's table.

    The exact flow is affine, so it carries N(0, s²) to a Gaussian whose mean is short of MEAN.
    """
    corners = float(path.sigma(jnp.float32(path.t_noise))) * jnp.array([[0.0, 0], [1, 0], [0, 1]])
    moved = analytic.gaussian_flow(MEAN, COVARIANCE, path, corners, path.t_noise, 0.0)
    factor = np.asarray(moved[1:] - moved[0], np.float64)
    return moved[0], factor.T @ factor


def test_ddim_is_euler_in_the_noise_to_signal_ratio():
    path = paths.LinearBeta()
    denoise = bound(GAUSSIAN.predict(path))
    x = jax.random.normal(jax.random.key(0), (5, 2))
    times = np.linspace(0.9, 0.2, 8)
    expected = np.asarray(x)
    for t, t_next in itertools.pairwise(times):
        # d(x/a) = eps · d(s/a), stepped by hand.
        a, s, a_next, s_next = (
            float(f(jnp.float32(u))) for u in (t, t_next) for f in (path.alpha, path.sigma)
        )
        eps = np.asarray(denoise(jnp.asarray(expected), jnp.float32(t)).eps)
        expected = a_next * (expected / a + eps * (s_next / a_next - s / a))
    keys = jax.random.split(jax.random.key(1), 5)
    result = integrate(denoise, solvers.ddim(), path, jnp.asarray(times), keys, x)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_the_ancestral_step_draws_from_the_posterior():
    """Mean and variance of q(x' | x, x0) from Bayes' rule, against one step's draws."""
    path, t, t_next = paths.LinearBeta(), 0.5, 0.45
    a, s = float(path.alpha(jnp.float32(t))), float(path.sigma(jnp.float32(t)))
    a_n, s_n = float(path.alpha(jnp.float32(t_next))), float(path.sigma(jnp.float32(t_next)))
    # x = (a/a')·x' + noise of variance q², x' ~ N(a'·x0, s'²): two Gaussian facts about x'.
    ratio, q2 = a / a_n, s**2 - (a / a_n * s_n) ** 2
    x, x0 = 0.4, -0.7
    variance = 1.0 / (ratio**2 / q2 + 1.0 / s_n**2)
    mean = variance * (ratio * x / q2 + a_n * x0 / s_n**2)

    n = 100_000
    start = jnp.full((n, 1), x)
    denoise = lambda x, t: Pair(jnp.full_like(x, x0), (x - a * x0) / s)  # noqa: E731
    keys = jax.random.split(jax.random.key(0), n)
    draws, _ = solvers.ddpm().step(
        denoise, path, (), start, jnp.float32(t), jnp.float32(t_next), keys
    )
    assert float(draws.mean()) == pytest.approx(mean, abs=5 * np.sqrt(variance / n))
    assert float(draws.var()) == pytest.approx(variance, rel=5 * np.sqrt(2 / n))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("learned", [False, True])
def test_the_variance_is_between_the_posteriors_and_the_forward_steps(share, learned):
    path, t, t_next = PATHS["linear"], 0.6, 0.5
    a, s, a_n, s_n = (
        float(of(jnp.float32(u))) for u in (t, t_next) for of in (path.alpha, path.sigma)
    )
    forward = s**2 - (a / a_n * s_n) ** 2  # of x given x'
    posterior = 1.0 / (1.0 / s_n**2 + (a / a_n) ** 2 / forward)  # of x' given x and x0
    n = 100_000

    def apply(params, x, noise_label, cond, *, train=False, key=None):
        return jnp.concatenate([jnp.zeros_like(x), jnp.full_like(x, 2.0 * share - 1.0)], axis=-1)

    how = Precond(Clean(), TimeLabel())
    predict = denoiser(apply, (), path, how, learned_variance=learned)
    solver = solvers.ddpm_learned() if learned else solvers.ddpm(share)
    keys = jax.random.split(jax.random.key(0), n)
    draws, _ = solver.step(
        bound(predict), path, (), jnp.zeros((n, 1)), jnp.float32(t), jnp.float32(t_next), keys
    )
    expected = posterior ** (1.0 - share) * forward**share
    assert float(draws.var()) == pytest.approx(expected, rel=5 * np.sqrt(2 / n))


@pytest.mark.parametrize(
    ("name", "path"),
    [(name, path) for name in SOLVERS for path in BASIC.values()]
    + [("ddpm", path) for path in PATHS.values()],
)
def test_no_noise_is_left_at_the_end(name, path):
    """Where the data is one point, one is where every sample ends, exactly."""
    point = jnp.array([0.3, -0.6])

    def denoise(x, t):
        t = jnp.ravel(t)[0]  # of a flow map, where it begins
        a, s = path.alpha(t), path.sigma(t)
        share = jnp.full_like(x, 0.3)
        return Pair(jnp.broadcast_to(point, x.shape), (x - a * point) / s, share)

    x = jax.random.normal(jax.random.key(0), (4, 2))
    keys = jax.random.split(jax.random.key(1), 4)
    for n in (1, 5):
        times = Recipe(SOLVERS[name], grids.Power(), n).times(path)
        end = sample(denoise, SOLVERS[name], path, times, keys, x)
        np.testing.assert_array_equal(end, jnp.broadcast_to(point, (4, 2)))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_declared_evaluations_are_the_ones_made(name, guidance_scale):
    path, rows_seen = paths.Linear(), []
    recipe = Recipe(SOLVERS[name], grids.Power(), num_steps=7, guidance_scale=guidance_scale)

    def predict(x, t, cond):
        jax.debug.callback(lambda: rows_seen.append(len(x)))
        return with_variance(GAUSSIAN.predict(path))(x, t, cond)

    scale = None if guidance_scale == 1.0 else jnp.float32(guidance_scale)
    guided = guide(Models(predict, null_label=1), path, scale=scale)
    times, keys = recipe.times(path), jax.random.split(jax.random.key(0), 3)

    def walk(way, times):
        rows_seen.clear()
        draw(guided, path, recipe.solver, times, keys, jnp.zeros(3, jnp.int32), (2,), walk=way)
        jax.effects_barrier()
        return sum(rows_seen) / 3

    if recipe.nfe is not None:
        assert walk(sample, times) == recipe.nfe
    else:
        counted = draw(
            guided, path, recipe.solver, padded(times), keys, jnp.zeros(3, jnp.int32), (2,),
            walk=count_padded,
        )  # fmt: skip
        assert walk(sample_padded, padded(times)) == counted * recipe.calls


@pytest.mark.parametrize("name", ["ddpm", "unipc", "restart"])
def test_padding_changes_no_sample(name):
    path = paths.Cosine()
    times = Recipe(SOLVERS[name], grids.Power(), 6).times(path)
    keys = jax.random.split(jax.random.key(0), 3)
    walk = partial(draw, GAUSSIAN.predict(path), path, SOLVERS[name])
    plain = walk(times, keys, None, (2,))
    np.testing.assert_allclose(
        walk(padded(times), keys, None, (2,), walk=sample_padded), plain, atol=1e-6
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_a_sample_depends_on_its_own_key_alone(name):
    path, solver = paths.Cosine(), SOLVERS[name]
    keys = jax.random.split(jax.random.key(0), 10_000)
    times, predict = Recipe(solver, grids.Power(), 5).times(path), GAUSSIAN.predict(path)
    run = jax.jit(lambda k: draw(with_variance(predict), path, solver, times, k, None, (2,)))
    # Where the batch decides on the steps, within what they may be wrong by.
    tolerance = {"adaptive": 1e-3, "adaptive_sde": 0.2}.get(name, 1e-5)
    np.testing.assert_allclose(run(keys)[4321:4323], run(keys[4321:4323]), atol=tolerance)


@pytest.mark.parametrize("name", ["ddpm", "unipc"])
def test_a_trace_is_of_the_same_samples(name):
    path, n = paths.Cosine(), 6
    predict, times = GAUSSIAN.predict(path), grids.Power()(path, n)
    keys = jax.random.split(jax.random.key(0), 3)
    walk = partial(draw, predict, path, SOLVERS[name], times, keys, None, (2,))
    traced, samples = walk(walk=trace), walk()
    assert traced.x.shape == (n + 1, 3, 2)
    assert traced.x0.shape == (n, 3, 2)
    np.testing.assert_allclose(traced.x[-1], samples, atol=1e-6)
    expected = [bound(predict)(x, t).x0 for x, t in zip(traced.x[:-1], times[:-1], strict=True)]
    np.testing.assert_allclose(traced.x0, jnp.stack(expected), atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@every_path
def test_grids_fall_from_noise_to_clean(grid, path):
    for n in (1, 2, 10, 1000):
        t = np.asarray(grid(path, n))
        assert t.shape == (n + 1,)
        assert t[0] == np.float32(path.t_noise)
        assert t[-1] == 0.0
        assert t[-2] >= np.float32(path.t_min)
        assert (np.diff(t) < (0 if n < 1000 else 1e-6)).all()


@every_path
def test_the_log_snr_grid_is_even_in_log_snr(path):
    t = grids.UniformLogSNR()(path, 12)[1:-1]
    steps = np.diff(paths.log_snr(path, t))
    np.testing.assert_allclose(steps, steps[0], rtol=2e-2)


def test_another_guidance_scale_does_not_recompile():
    path = paths.Linear()
    times = grids.Power()(path, 3)
    traced = []

    @jax.jit
    def run(keys, scale):
        traced.append(1)
        labels = jnp.zeros(len(keys), jnp.int32)
        predict = guide(Models(GAUSSIAN.predict(path)), path, scale=scale)
        return draw(predict, path, solvers.euler(), times, keys, labels, (2,))

    keys = jax.random.split(jax.random.key(0), 2)
    for scale in (1.5, 2.0, 4.0):
        run(keys, jnp.float32(scale))
    assert len(traced) == 1
