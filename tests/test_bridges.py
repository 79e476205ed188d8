"""Interpolants and bridges against Gaussians, whose velocities, posteriors and maps are known."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.objectives import couplings
from diffjax.objectives.base import Progress
from diffjax.objectives.denoising import Denoising
from diffjax.objectives.interpolant import Interpolant, SourceBridge, bridge_shift
from diffjax.process import precond, targets, times, weights
from diffjax.process.bridges import Brownian, BrownianBridge, NoBridge, SineSquared
from diffjax.process.paths import Cosine, Linear, Pair, coeffs, log_snr, mix
from diffjax.process.precond import denoiser
from diffjax.process.targets import decode, encode
from diffjax.sampling import solvers
from diffjax.sampling.grids import Power
from diffjax.sampling.sample import draw, integrate

GAMMAS = {"none": NoBridge(), "brownian": Brownian(0.7), "sine": SineSquared(0.6)}
PATHS = {"linear": Linear(t_noise=0.99), "cosine": Cosine(t_noise=0.99)}
# Data and source, both of one number: means and variances.
M0, C0, M1, C1 = 0.5, 0.3, -0.8, 1.7


def objective(kind, path=PATHS["linear"], target=targets.Velocity(), **options):
    return kind(
        path=path,
        precond=precond.Precond(target, precond.TimeLabel(1.0)),
        weight=weights.Constant(),
        times=times.Uniform(),
        **options,
    )


def ends(n, seed=0):
    """A batch of independent Gaussian ends, `[n, 1]`."""
    a, b = np.random.default_rng(seed).standard_normal((2, n, 1)).astype(np.float32)
    return {
        "image": M0 + np.sqrt(C0) * a,
        "source": M1 + np.sqrt(C1) * b,
        "label": jnp.zeros(n, jnp.int32),
    }


def exact_velocity(path, gamma, x, t):
    """E[a'·x0 + b'·x1 + γ'·z | x_t = x] for the ends above: regression of Gaussians."""
    a, b, g = path.alpha(t), path.sigma(t), gamma(t)
    da, db, dg = (jax.vmap(jax.grad(f))(t) for f in (path.alpha, path.sigma, gamma))
    covariance = a * da * C0 + b * db * C1 + g * dg
    variance = a**2 * C0 + b**2 * C1 + g**2
    slope = (covariance / variance)[:, None]
    return (da * M0 + db * M1)[:, None] + slope * (x - (a * M0 + b * M1)[:, None])


def gradient_z(objective, batch, best, deviations):
    """Gradients of the mean loss at a prediction along some deviations, in standard errors."""

    def apply(params, x, noise_label, cond, *, train=False, key=None):
        truth = best(x, noise_label)
        return truth + sum(p * d(x[..., :1], noise_label) for p, d in zip(params, deviations))

    def losses(params):
        key, progress = jax.random.key(1), Progress(jnp.zeros(()))
        return objective(apply, params, params, key, batch, progress)[0]

    each = jax.jit(jax.jacfwd(losses))(jnp.zeros(len(deviations)))
    each = np.asarray(each, np.float64)
    return each.mean(0) / (each.std(0) / np.sqrt(len(each)))


DEVIATIONS = (
    lambda x, t: jnp.ones_like(x),
    lambda x, t: x,
    lambda x, t: x * jnp.cos(3.0 * t)[:, None],
    lambda x, t: jnp.tanh(2.0 * x),
)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("path", PATHS)
def test_the_exact_velocity_is_the_interpolants_minimum(path, gamma):
    path, gamma = PATHS[path], GAMMAS[gamma]
    loss = objective(Interpolant, path, coupling=couplings.Translation(), gamma=gamma)
    batch = ends(100_000)

    def best(x, t):
        return exact_velocity(path, gamma, x, t)

    z = gradient_z(loss, batch, best, DEVIATIONS)
    assert np.abs(z).max() < 4.5
    # The test sees an error of a twentieth, and the wrong bridge noise.
    assert np.abs(gradient_z(loss, batch, lambda x, t: 1.05 * best(x, t), DEVIATIONS)).max() > 10
    other = replace(loss, gamma=SineSquared(1.0))
    assert np.abs(gradient_z(other, batch, best, DEVIATIONS)).max() > 10


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("target", [targets.Velocity(), targets.V(), targets.Clean()], ids=repr)
def test_any_target_decodes_to_the_velocity_with_the_bridge_noise(target, gamma):
    path, gamma = PATHS["cosine"], GAMMAS[gamma]
    t = jnp.linspace(0.05, 0.95, 7)
    c = coeffs(path, t, ndim=2)
    x0, x1, z = np.random.default_rng(0).standard_normal((3, 7, 1)).astype(np.float32)
    value, slope = gamma(c.t), jax.vmap(jax.grad(gamma))(t)[:, None]
    shift = bridge_shift(gamma, c)
    pair = Pair(x0 + shift.x0 * z, x1 + shift.eps * z)
    x_t = mix(c, pair)
    np.testing.assert_allclose(x_t, c.a * x0 + c.s * x1 + value * z, atol=1e-5)
    k = target(c)
    decoded = decode(c, k, encode(k, pair), x_t)
    velocity = c.da * decoded.x0 + c.ds * decoded.eps
    np.testing.assert_allclose(velocity, c.da * x0 + c.ds * x1 + slope * z, atol=1e-4)


def test_without_bridge_noise_from_noise_it_is_flow_matching():
    batch, t = ends(64), jnp.linspace(0.1, 0.9, 64)
    key = jax.random.key(3)
    flow = objective(Denoising).noised(t, jax.random.split(key)[1], batch)
    interpolant = objective(Interpolant, gamma=NoBridge())
    got = interpolant.noised(t, key, batch)
    np.testing.assert_allclose(got.x_t, flow.x_t, atol=1e-6)
    np.testing.assert_allclose(encode(got.k, got.pair), encode(flow.k, flow.pair), atol=1e-6)
    assert not interpolant.starts_at_source


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_probability_flow_carries_the_source_onto_the_data(gamma):
    """All is Gaussian in one dimension, so the flow keeps each point's quantile."""
    path, gamma = PATHS["linear"], GAMMAS[gamma]
    loss = objective(Interpolant, path, coupling=couplings.Translation(), gamma=gamma)
    predict = denoiser(
        lambda params, x, t, cond: exact_velocity(path, gamma, x, t), (), path, loss.precond
    )
    quantiles = jnp.linspace(-2.0, 2.0, 9)[:, None]

    def at(t):
        variance = path.alpha(t) ** 2 * C0 + path.sigma(t) ** 2 * C1 + gamma(t) ** 2
        return path.alpha(t) * M0 + path.sigma(t) * M1 + jnp.sqrt(variance) * quantiles

    grid = jnp.linspace(path.t_noise, 0.02, 200)
    keys = jax.random.split(jax.random.key(0), 9)
    end = integrate(
        lambda x, t: predict(x, jnp.full(len(x), t), None),
        solvers.heun(), path, grid, keys, at(grid[0]),
    )  # fmt: skip
    np.testing.assert_allclose(end, at(grid[-1]), atol=2e-3)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("from_noise", [True, False])
def test_sampling_starts_with_the_distribution_that_training_ends_with(gamma, from_noise):
    coupling = couplings.Independent() if from_noise else couplings.Translation()
    loss = objective(Interpolant, coupling=coupling, gamma=GAMMAS[gamma])
    batch = ends(200_000)
    noise = jax.random.normal(jax.random.key(0), batch["image"].shape)
    start = loss.start(noise, None if from_noise else batch["source"])
    t = jnp.full(len(noise), loss.path.t_noise)
    x_t = loss.noised(t, jax.random.key(1), batch).x_t - loss.path.alpha(t)[:, None] * M0
    np.testing.assert_allclose(jnp.mean(start), jnp.mean(x_t), atol=0.02)
    np.testing.assert_allclose(jnp.std(start), jnp.std(x_t), rtol=0.01)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_brownian_bridge_is_a_path_with_the_bridges_own_posterior(scale):
    """DDPM's step against a Brownian motion from x0, given where it is at t and at 1."""
    path = BrownianBridge(scale)
    x0, x1, u, t, n = 0.4, -1.3, 0.35, 0.8, 200_000
    assert (np.diff(log_snr(path, jnp.linspace(path.t_min, path.t_noise, 99))) < 0).all()

    x_t = -0.2
    at = np.array([u, t, 1.0])
    covariance = scale**2 * np.minimum(at[:, None], at)
    gain = covariance[0, 1:] @ np.linalg.inv(covariance[1:, 1:])
    mean = x0 + gain @ (np.array([x_t, x1]) - x0)
    variance = covariance[0, 0] - gain @ covariance[1:, 0]
    np.testing.assert_allclose(variance, scale**2 * u * (t - u) / t)

    y_t = np.full((n, 1), x_t - t * x1, np.float32)
    s = float(path.sigma(jnp.asarray(t)))
    pair = Pair(np.full_like(y_t, x0), (y_t - (1 - t) * x0) / s)
    keys = jax.random.split(jax.random.key(0), n)
    y_u, _ = jax.jit(
        lambda keys: solvers.ddpm().step(
            lambda x, t: pair, path, (), y_t, jnp.asarray(t), jnp.asarray(u), keys
        )
    )(keys)
    x_u = np.asarray(y_u, np.float64) + u * x1
    assert abs(x_u.mean() - mean) < 4.5 * np.sqrt(variance / n)
    assert abs(x_u.var() / variance - 1) < 4.5 * np.sqrt(2 / n)


RHO, CONDITIONAL = 0.6, 0.2  # x0 | x1 ~ N(RHO·x1 + M0, CONDITIONAL)


def joint(n):
    batch = ends(n)
    noise = (batch["image"] - M0) / np.sqrt(C0)
    return {**batch, "image": M0 + RHO * batch["source"] + np.sqrt(CONDITIONAL) * noise}


def bridge_of_the_joint(x_and_source, t, path):
    """E[x0 | x_t, x1], from the two channels that the network sees."""
    x, source = jnp.split(x_and_source, 2, axis=-1)
    a, s = path.alpha(t)[:, None], path.sigma(t)[:, None]
    prior = M0 + RHO * source
    residual = x - (1.0 - a) * source - a * prior
    return prior + a * CONDITIONAL / (a**2 * CONDITIONAL + s**2) * residual


@pytest.mark.parametrize("path", [BrownianBridge(0.8), Linear(t_noise=0.99)], ids=["brown", "lin"])
def test_a_source_bridges_minimum_is_the_posterior_given_the_source(path):
    loss = objective(SourceBridge, path, targets.Clean())
    assert (loss.inputs, loss.needs_source, loss.starts_at_source) == (2, True, True)
    batch = joint(100_000)
    z = gradient_z(loss, batch, lambda x, t: bridge_of_the_joint(x, t, path), DEVIATIONS)
    assert np.abs(z).max() < 4.5
    wrong = gradient_z(loss, batch, lambda x, t: bridge_of_the_joint(x, 0.9 * t, path), DEVIATIONS)
    assert np.abs(wrong).max() > 10


@pytest.mark.parametrize("solver", [solvers.ddim(), solvers.ddpm()], ids=["ddim", "ddpm"])
@pytest.mark.parametrize("guidance_scale", [None, 1.0])
def test_a_source_bridge_draws_from_the_images_of_the_source(solver, guidance_scale):
    path = BrownianBridge(0.8)
    loss = objective(SourceBridge, path, targets.Clean())
    n = 20_000
    source = jnp.where(jnp.arange(n)[:, None] % 2 == 0, 1.0, -2.0)

    def apply(params, x, noise_label, cond):
        return bridge_of_the_joint(x, noise_label, path)

    @jax.jit
    def sampled(keys):
        predict = denoiser(apply, (), path, loss.precond_for(source))
        labels = jnp.zeros(n, jnp.int32)
        grid = Power()(path, 80)
        return draw(
            predict, path, solver, grid, keys, labels, (1,), guidance_scale=guidance_scale,
            start=lambda noise: loss.start(noise, source),
        )  # fmt: skip

    x = np.asarray(sampled(jax.random.split(jax.random.key(0), n)))
    for part, value in ((x[::2], 1.0), (x[1::2], -2.0)):
        np.testing.assert_allclose(part.mean(), M0 + RHO * value, atol=0.02)
        np.testing.assert_allclose(part.std(), np.sqrt(CONDITIONAL), rtol=0.05)


def reflow_velocity(x, t):
    """Of the pairs `x0 = M0 + √C0·x1`: along each line it is constant."""
    noise = (x - (1.0 - t) * M0) / ((1.0 - t) * np.sqrt(C0) + t)
    return noise - (M0 + np.sqrt(C0) * noise)


def test_reflow_makes_paths_straight_and_one_step_exact():
    path = Linear()
    loss = objective(Denoising, path, coupling=couplings.Given())
    noise = np.random.default_rng(0).standard_normal((20_000, 1)).astype(np.float32)
    pairs = {
        "image": M0 + np.float32(np.sqrt(C0)) * noise,
        "source": noise,
        "label": jnp.zeros(len(noise), jnp.int32),
    }

    def apply(params, x, t, cond, *, train=False, key=None):
        return reflow_velocity(x, t[:, None])

    key, progress = jax.random.key(0), Progress(jnp.zeros(()))
    exact, _ = loss(apply, (), (), key, pairs, progress)
    np.testing.assert_allclose(exact, 0.0, atol=1e-8)
    # With fresh noise the same velocity is far from the best one, and even that leaves a variance.
    fresh, _ = objective(Denoising, path)(apply, (), (), key, pairs, progress)
    assert jnp.mean(fresh) > 0.3

    def one_step(apply):
        keys = jax.random.split(jax.random.key(1), 1000)
        starts = []

        def start(noise):
            starts.append(noise)
            return loss.start(noise, None)

        predict = denoiser(apply, (), path, loss.precond)
        grid = Power()(path, 1)
        return starts, draw(predict, path, solvers.euler(), grid, keys, None, (1,), start=start)

    (noise,), x = one_step(apply)
    np.testing.assert_allclose(x, M0 + np.sqrt(C0) * noise, atol=1e-5)

    # Before reflow the velocity of the same flow ends at the mean of the data in one step.
    def straight(params, x, t, cond):
        slope = ((t - (1 - t) * C0) / ((1 - t) ** 2 * C0 + t**2))[:, None]
        return -M0 + slope * (x - (1 - t)[:, None] * M0)

    np.testing.assert_allclose(one_step(straight)[1], M0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Denoising, {"coupling": couplings.Given()}),
        (Interpolant, {"coupling": couplings.Translation(), "gamma": NoBridge()}),
        (SourceBridge, {}),
    ],
)
def test_a_batch_without_sources_is_refused_by_name(kind, options):
    loss = objective(kind, **options)
    batch = {name: value for name, value in ends(2).items() if name != "source"}
    with pytest.raises(UserError, match="only image, label"):
        loss.noised(jnp.full(2, 0.5), jax.random.key(0), batch)
    assert loss.needs_source


def test_a_bridge_is_not_asked_without_its_source():
    with pytest.raises(UserError, match="source=images"):
        objective(SourceBridge).precond_for(None)
