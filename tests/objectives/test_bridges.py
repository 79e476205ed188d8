"""Interpolants and bridges against Gaussians, whose velocities, posteriors and maps are known."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import register_dataclass

import diffjax
from diffjax import choices, config_files
from diffjax.compiling import once
from diffjax.conditions import of_classes
from diffjax.data import (
    Augment,
    Coarse,
    PairSource,
    TranslatedSource,
    batches,
    digits,
    eval_batches,
    pairs,
    to_float,
    translation,
)
from diffjax.errors import UserError
from diffjax.objectives import couplings
from diffjax.objectives.base import Progress
from diffjax.objectives.denoising import Denoising
from diffjax.objectives.interpolant import Interpolant, SourceBridge, bridge_shift
from diffjax.objectives.wrappers import Uncertainty
from diffjax.process import precond, targets, times, weights
from diffjax.process.bridges import Brownian, BrownianBridge, NoBridge, SineSquared
from diffjax.process.paths import Cosine, Linear, Pair, coeffs, log_snr, mix
from diffjax.process.precond import Meaning, denoiser
from diffjax.process.targets import decode, encode
from diffjax.runs.samples.model import Request
from diffjax.sampling import solvers
from diffjax.sampling.grids import Power
from diffjax.sampling.guidance import GuidanceModels, guide
from diffjax.sampling.sample import integrate, starting_noise, with_condition
from diffjax.sampling.sample import sample as sampled_by
from diffjax.sampling.solvers import Interval
from diffjax.wiring import check_wired, wire
from experiments import reflow, sample, train
from experiments.flags import cli
from tests.support.any_path import numbered

GAMMAS = {"none": NoBridge(), "brownian": Brownian(0.7), "sine": SineSquared(0.6)}
PATHS = {"linear": Linear(t_noise=0.99), "cosine": Cosine(t_noise=0.99)}
NUMBERED = numbered(PATHS)


@register_dataclass
@dataclass(frozen=True)
class AnyGamma:
    """One of the bridge noises above, or another one, by its number: one program for all."""

    which: Any

    def __call__(self, t):
        return jnp.stack([gamma(t) for gamma in (*GAMMAS.values(), SineSquared(1.0))])[self.which]


NUMBERS = {name: np.int32(i) for i, name in enumerate([*GAMMAS, "other"])}
# Data and source, both of one number: means and variances.
M0, C0, M1, C1 = 0.5, 0.3, -0.8, 1.7


VELOCITY = targets.Velocity()


def objective(kind, path: Any = PATHS["linear"], target: Any = VELOCITY, **options) -> Any:
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
        "label": np.zeros(n, np.int32),
        "cond": np.zeros(n, np.int32),
    }


def exact_velocity(path, gamma, x, t):
    """E[a'·x0 + b'·x1 + γ'·z | x_t = x] for the ends above: regression of Gaussians."""
    a, b, g = path.alpha(t), path.sigma(t), gamma(t)
    da, db, dg = (jax.vmap(jax.grad(f))(t) for f in (path.alpha, path.sigma, gamma))
    covariance = a * da * C0 + b * db * C1 + g * dg
    variance = a**2 * C0 + b**2 * C1 + g**2
    slope = (covariance / variance)[:, None]
    return (da * M0 + db * M1)[:, None] + slope * (x - (a * M0 + b * M1)[:, None])


def network(answer) -> Any:
    """`answer(x, t)` as a network without parameters."""
    return lambda params, x, noise_label, cond, **options: answer(x, noise_label)


def gradients(objective, batch, best):
    """Gradients of the losses at a prediction, along some deviations, `[B, K]`."""

    def apply(params, x, noise_label, cond, *, key=None):
        truth = best(x, noise_label)
        return truth + sum(
            p * d(x[..., :1], noise_label) for p, d in zip(params, DEVIATIONS, strict=True)
        )

    def losses(params):
        key, progress = jax.random.key(1), Progress(jnp.zeros(()))
        return objective(apply, params, params, key, batch, progress)[0]

    return jax.jacfwd(losses)(jnp.zeros(len(DEVIATIONS)))


def in_standard_errors(each):
    each = np.asarray(each, np.float64)
    return each.mean(0) / (each.std(0) / np.sqrt(len(each)))


DEVIATIONS = (
    lambda x, t: jnp.ones_like(x),
    lambda x, t: x,
    lambda x, t: x * jnp.cos(3.0 * t)[:, None],
    lambda x, t: jnp.tanh(2.0 * x),
)


@once()
def gradients_of_an_interpolant(path, drawn, best, factor, batch):
    """With one bridge noise in the loss, the exact velocity of another, and a factor of that."""
    loss = objective(Interpolant, path, coupling=couplings.Translation(), gamma=drawn)
    return gradients(loss, batch, lambda x, t: factor * exact_velocity(path, best, x, t))


@pytest.mark.parametrize(
    ("path_name", "name"),
    [
        ("linear", "none"),
        ("cosine", "brownian"),
        ("linear", "sine"),
        pytest.param("cosine", "none", marks=pytest.mark.thorough),
        pytest.param("linear", "brownian", marks=pytest.mark.thorough),
        pytest.param("cosine", "sine", marks=pytest.mark.thorough),
    ],
)
def test_the_exact_velocity_is_the_interpolants_minimum(path_name, name):
    path, batch, gamma = NUMBERED[path_name], ends(100_000), AnyGamma(NUMBERS[name])

    def z(drawn, factor):
        found = gradients_of_an_interpolant(path, drawn, gamma, np.float32(factor), batch)
        return np.abs(in_standard_errors(found)).max()

    assert z(gamma, 1.0) < 4.5
    # The test sees an error of a twentieth, and the wrong bridge noise.
    assert z(gamma, 1.05) > 10
    assert z(AnyGamma(NUMBERS["other"]), 1.0) > 10


TARGETS = (targets.Velocity(), targets.V(), targets.Clean())


@jax.jit
def shifted_and_decoded(gamma, t, x0, x1, z):
    """`x_t`, then the velocity by each of the targets."""
    c = coeffs(PATHS["cosine"], t, ndim=2)
    shift = bridge_shift(gamma, c)
    pair = Pair(x0 + shift.x0 * z, x1 + shift.eps * z)
    x_t, velocities = mix(c, pair), []
    for target in TARGETS:
        k = target(c)
        decoded = decode(c, k, encode(k, pair), x_t)
        velocities.append(c.da * decoded.x0 + c.ds * decoded.eps)
    return x_t, velocities


# What is added to the noise of a pair, and its slope, in NumPy.
BRIDGE_NOISE = {
    "none": (lambda t: 0.0 * t, lambda t: 0.0 * t),
    "brownian": (
        lambda t: 0.7 * np.sqrt(t * (1 - t)),
        lambda t: 0.7 * (1 - 2 * t) / (2 * np.sqrt(t * (1 - t))),
    ),
    "sine": (
        lambda t: 0.6 * np.sin(np.pi * t) ** 2,
        lambda t: 0.6 * np.pi * np.sin(2 * np.pi * t),
    ),
}


@pytest.mark.parametrize("gamma", GAMMAS)
def test_any_target_decodes_to_the_velocity_with_the_bridge_noise(gamma):
    t = np.linspace(0.05, 0.95, 7).astype(np.float32)
    x0, x1, z = np.random.default_rng(0).standard_normal((3, 7, 1)).astype(np.float32)
    x_t, velocities = shifted_and_decoded(AnyGamma(NUMBERS[gamma]), t, x0, x1, z)
    value, slope = (of(t.astype(float))[:, None] for of in BRIDGE_NOISE[gamma])
    angle = 0.5 * np.pi * t.astype(float)[:, None]
    a, s = np.cos(angle), np.sin(angle)
    np.testing.assert_allclose(x_t, a * x0 + s * x1 + value * z, atol=1e-5)
    for velocity in velocities:
        expected = 0.5 * np.pi * (a * x1 - s * x0) + slope * z
        np.testing.assert_allclose(velocity, expected, atol=1e-4)


def test_without_bridge_noise_from_noise_it_is_flow_matching():
    interpolant = objective(Interpolant, gamma=NoBridge())

    @jax.jit
    def program(t, key, batch):
        """`x_t` and the target by both."""
        both = (
            interpolant.noised(t, key, batch),
            objective(Denoising).noised(t, jax.random.split(key)[1], batch),
        )
        return [(noised.x_t, encode(noised.k, noised.pair)) for noised in both]

    t = np.linspace(0.1, 0.9, 64).astype(np.float32)
    (x_t, target), (x_t_of_flow, target_of_flow) = program(t, jax.random.key(3), ends(64))
    np.testing.assert_allclose(x_t, x_t_of_flow, atol=1e-6)
    np.testing.assert_allclose(target, target_of_flow, atol=1e-6)
    assert not interpolant.traits.starts_at_source


@jax.jit
def carried_by_the_flow(gamma):
    """Quantiles where sampling starts, carried by the exact velocity, and those where it ends."""
    path = PATHS["linear"]
    loss = objective(Interpolant, path, coupling=couplings.Translation(), gamma=gamma)
    predict = denoiser(
        network(lambda x, t: exact_velocity(path, gamma, x, t)), (), path, loss.precond
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
    return end, at(grid[-1])


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_probability_flow_carries_the_source_onto_the_data(gamma):
    """All is Gaussian in one dimension, so the flow keeps each point's quantile."""
    end, expected = carried_by_the_flow(AnyGamma(NUMBERS[gamma]))
    np.testing.assert_allclose(end, expected, atol=2e-3)


@partial(jax.jit, static_argnums=1)
def first_and_last(gamma, from_noise, batch):
    """Where samples start, and `x_t` without the image at that time."""
    coupling = couplings.Independent() if from_noise else couplings.Translation()
    loss = objective(Interpolant, coupling=coupling, gamma=gamma)
    noise = jax.random.normal(jax.random.key(0), batch["image"].shape)
    t = jnp.full(len(noise), loss.path.t_noise)
    x_t = loss.noised(t, jax.random.key(1), batch).x_t - loss.path.alpha(t)[:, None] * M0
    return loss.start(noise, None if from_noise else batch["source"]), x_t


@pytest.mark.parametrize("name", GAMMAS)
@pytest.mark.parametrize("from_noise", [True, False])
def test_sampling_starts_with_the_distribution_that_training_ends_with(name, from_noise):
    start, x_t = first_and_last(AnyGamma(NUMBERS[name]), from_noise, ends(100_000))
    np.testing.assert_allclose(np.mean(start), np.mean(x_t), atol=0.02)
    np.testing.assert_allclose(np.std(start), np.std(x_t), rtol=0.01)


@once()
def after_a_step(path, x_t, t, u, x0, x1, keys):
    """DDPM's step from `x_t` with `x1` taken off, given both ends; and log-SNR along the path."""
    y_t = jnp.broadcast_to(x_t - t * x1, (len(keys), 1))
    pair = Pair(jnp.full_like(y_t, x0), (y_t - (1 - t) * x0) / path.sigma(t))
    y_u, _ = solvers.ddpm().step(lambda x, t: pair, Interval(path, t, u, keys), (), y_t)
    return y_u, log_snr(path, jnp.linspace(path.t_min, path.t_noise, 99))


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_brownian_bridge_is_a_path_with_the_bridges_own_posterior(scale):
    """DDPM's step against a Brownian motion from x0, given where it is at t and at 1."""
    x0, x1, u, t, n = 0.4, -1.3, 0.35, 0.8, 200_000
    x_t = -0.2
    at = np.array([u, t, 1.0])
    covariance = scale**2 * np.minimum(at[:, None], at)
    gain = covariance[0, 1:] @ np.linalg.inv(covariance[1:, 1:])
    mean = x0 + gain @ (np.array([x_t, x1]) - x0)
    variance = covariance[0, 0] - gain @ covariance[1:, 0]
    np.testing.assert_allclose(variance, scale**2 * u * (t - u) / t)

    numbers = map(np.float32, (x_t, t, u, x0, x1))
    keys = jax.random.split(jax.random.key(0), n)
    y_u, along = after_a_step(BrownianBridge(scale), *numbers, keys)
    assert (np.diff(along) < 0).all()
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


BRIDGES = numbered({"brownian": BrownianBridge(0.8), "linear": Linear(t_noise=0.99)})


@once()
def gradients_of_a_source_bridge(path, clock, batch):
    loss = objective(SourceBridge, path, targets.Clean())
    return gradients(loss, batch, lambda x, t: bridge_of_the_joint(x, clock * t, path))


@pytest.mark.parametrize("path", BRIDGES.values(), ids=BRIDGES)
def test_a_source_bridges_minimum_is_the_posterior_given_the_source(path):
    loss = objective(SourceBridge, path, targets.Clean())
    traits = loss.traits
    assert (traits.inputs, traits.needs_source, traits.starts_at_source) == (2, True, True)
    right, wrong = (
        gradients_of_a_source_bridge(path, np.float32(clock), joint(100_000))
        for clock in (1.0, 0.9)
    )
    assert np.abs(in_standard_errors(right)).max() < 4.5
    assert np.abs(in_standard_errors(wrong)).max() > 10


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize(
    ("solver", "guidance_scale"),
    [pytest.param(solvers.ddim(), 1.0, id="ddim"), pytest.param(solvers.ddpm(), None, id="ddpm")],
)
def test_a_source_bridge_draws_from_the_images_of_the_source(solver, guidance_scale):
    path = BrownianBridge(0.8)
    loss = objective(SourceBridge, path, targets.Clean())
    n = 10_000
    source = jnp.where(jnp.arange(n)[:, None] % 2 == 0, 1.0, -2.0)

    apply = network(lambda x, t: bridge_of_the_joint(x, t, path))

    @jax.jit
    def sampled(keys):
        predict = guide(
            GuidanceModels(denoiser(apply, (), path, loss.precond_for(source))),
            path,
            scale=guidance_scale,
        )
        denoise = with_condition(predict, jnp.zeros(n, jnp.int32))
        noise, keys = starting_noise(keys, (1,))
        grid = Power()(path, 150)
        return sampled_by(denoise, solver, path, grid, keys, loss.start(noise, source))

    x = np.asarray(sampled(jax.random.split(jax.random.key(0), n)))
    for part, value in ((x[::2], 1.0), (x[1::2], -2.0)):
        np.testing.assert_allclose(part.mean(), M0 + RHO * value, atol=0.02)
        np.testing.assert_allclose(part.std(), np.sqrt(CONDITIONAL), rtol=0.04)


def reflow_velocity(x, t):
    """Of the pairs `x0 = M0 + √C0·x1`: along each line it is constant."""
    noise = (x - (1.0 - t) * M0) / ((1.0 - t) * np.sqrt(C0) + t)
    return noise - (M0 + np.sqrt(C0) * noise)


@pytest.mark.thorough(tenth=False)
def test_reflow_makes_paths_straight_and_one_step_exact():
    path = Linear()
    loss = objective(Denoising, path, coupling=couplings.Given())
    noise = np.random.default_rng(0).standard_normal((20_000, 1)).astype(np.float32)
    pairs = {
        "image": M0 + np.float32(np.sqrt(C0)) * noise,
        "source": noise,
        "cond": np.zeros(len(noise), np.int32),
    }

    apply = network(lambda x, t: reflow_velocity(x, t[:, None]))

    @jax.jit
    def losses(key, pairs):
        progress = Progress(jnp.zeros(()))
        return [
            each(apply, (), (), key, pairs, progress)[0]
            for each in (loss, objective(Denoising, path))
        ]

    exact, fresh = losses(jax.random.key(0), pairs)
    np.testing.assert_allclose(exact, 0.0, atol=1e-8)
    # With fresh noise the same velocity is far from the best one, and even that leaves a variance.
    assert np.mean(fresh) > 0.3

    def one_step(apply):
        """The noise that samples start from, and where they are after one step."""

        @jax.jit
        def program(keys):
            denoise = with_condition(denoiser(apply, (), path, loss.precond), None)
            noise, keys = starting_noise(keys, (1,))
            x, grid = loss.start(noise, None), Power()(path, 1)
            return noise, sampled_by(denoise, solvers.euler(), path, grid, keys, x)

        return program(jax.random.split(jax.random.key(1), 1000))

    noise, x = one_step(apply)
    np.testing.assert_allclose(x, M0 + np.sqrt(C0) * noise, atol=1e-5)

    # Before reflow the velocity of the same flow ends at the mean of the data in one step.
    @network
    def straight(x, t):
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
        jax.eval_shape(loss.noised, np.full(2, 0.5, np.float32), jax.random.key(0), batch)
    assert loss.traits.needs_source


def test_a_wrapper_asks_for_what_the_objective_that_it_wraps_asks_for():
    wrapped, source = Uncertainty(objective(SourceBridge, BrownianBridge(0.8))), ends(2)["source"]
    assert (wrapped.traits.inputs, wrapped.traits.outputs) == (2, 1)
    assert wrapped.traits.needs_source
    assert wrapped.traits.starts_at_source
    assert wrapped.traits.independent_noise
    assert not wrapped.traits.learned_variance
    assert wrapped.traits.meaning is Meaning.POSTERIOR_MEAN
    assert not wrapped.traits.forward_mode
    assert type(wrapped.precond_for(source)) is type(wrapped.objective.precond_for(source))
    deviation = 0.8 * np.sqrt(0.9999 * 0.0001)
    np.testing.assert_allclose(wrapped.start(source, None), deviation * source, rtol=1e-3)
    interpolant = Uncertainty(objective(Interpolant, gamma=NoBridge()))
    assert not interpolant.traits.needs_source
    assert not interpolant.traits.independent_noise


def test_a_bridge_is_not_asked_without_its_source():
    with pytest.raises(UserError, match="source=images"):
        objective(SourceBridge).precond_for(None)


# Pairs as data.


def batch_of_pairs(n=6):
    random = np.random.default_rng(0)
    return PairSource(
        random.standard_normal((n, 4, 4, 1)).astype(np.float32),
        random.integers(0, 256, (n, 4, 4, 1)).astype(np.uint8),
        np.arange(n, dtype=np.int32) % 2,
    )


def test_pairs_stay_together_through_the_pipeline_in_their_own_units():
    source = batch_of_pairs()
    stream = batches(source, batch_size=12, seed=0, augment=Augment(flip_probability=0.5))
    batch: Any = next(stream)
    flipped = 0
    for image, end, label in zip(batch["image"], batch["source"], batch["label"], strict=True):
        changes = {False: lambda x: x, True: lambda x: x[:, ::-1]}
        (row, flip), *others = [
            (row, flip)
            for row in range(6)
            for flip, change in changes.items()
            if np.array_equal(image, change(source.images[row]))
        ]
        assert not others
        np.testing.assert_array_equal(end, changes[flip](to_float(source.sources[row])))
        assert label == source.labels[row]
        flipped += flip
    assert 0 < flipped < 12
    (whole,) = eval_batches(source, batch_size=6)
    np.testing.assert_array_equal(whole["image"], source.images)
    one_by_one = super(PairSource, source).gather([4, 1])
    for name, rows in source.gather([4, 1]).items():
        np.testing.assert_array_equal(one_by_one[name], rows)


def test_the_fingerprint_of_pairs_sees_both_ends():
    source = batch_of_pairs()
    changed = [
        replace(source, images=source.images + 1),
        replace(source, sources=source.sources + np.uint8(1)),
        replace(source, sources=source.sources.astype(np.float32)),
        replace(source, labels=source.labels[::-1]),
        TranslatedSource(source, Coarse(2)),
        TranslatedSource(source, Coarse(4)),
    ]
    assert len({other.fingerprint() for other in [source, *changed]}) == 7
    assert batch_of_pairs().fingerprint() == source.fingerprint()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": np.zeros((2, 8, 8, 1), np.float32)}, "lacks label, source"),
        ({"image": np.zeros((2, 8, 8, 1))}, "must be uint8 or float32"),
        ({"source": np.zeros((3, 8, 8, 1), np.float32)}, "sources of the images' shape"),
        ({"source": np.full((2, 8, 8, 1), np.nan, np.float32)}, "not finite"),
        ({"label": np.array([0, 10])}, "labels in .* go from 0 to 10"),
        ({"label": np.array([0, None])}, "holds objects, not numbers"),
        ({"image": np.zeros((2, 4, 4, 1), np.uint8), "source": np.zeros((2, 4, 4, 1), np.uint8)},
         r"have shape \(4, 4, 1\)"),
    ],
)  # fmt: skip
def test_files_of_pairs_that_do_not_fit_are_refused(tmp_path, arrays, message):
    whole = {
        "image": np.zeros((2, 8, 8, 1), np.float32),
        "source": np.zeros((2, 8, 8, 1), np.float32),
        "label": np.array([3, 9]),
    }
    path = tmp_path / "pairs.npz"
    np.savez(path, **(arrays if "lacks" in message else whole | arrays))
    with pytest.raises(UserError, match=message):
        pairs(digits(), str(path))


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_what_is_no_file_of_pairs_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "pairs.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)):
        pairs(digits(), str(path))
    with pytest.raises(UserError, match="python -m experiments"):
        pairs(digits())


def test_pairs_are_compared_with_real_images(tmp_path):
    real, path = digits(), tmp_path / "pairs.npz"
    made = np.zeros((2, 8, 8, 1), np.float32)
    np.savez(path, image=made, source=made, label=np.array([3, 9]))
    data = pairs(real, str(path))
    assert len(data.train) == 2
    assert data.reference.fingerprint() == real.train.fingerprint() == real.reference.fingerprint()
    assert data.test is real.test or data.test.fingerprint() == real.test.fingerprint()


def test_translation_pairs_each_image_with_its_changed_copy():
    data = translation(digits(), Coarse(2))
    batch: Any = data.test.gather([3, 5])
    image, source = batch["image"].astype(float), batch["source"].astype(float)
    np.testing.assert_allclose(source[:, ::2, 1::2], source[:, 1::2, ::2])
    np.testing.assert_allclose(source[1, 2, 4], image[1, 2:4, 4:6].mean(), atol=0.5)
    with pytest.raises(UserError, match="Coarse"):
        Coarse(3)(batch["image"])


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("otcfm", True),
        ("flow", False),
        pytest.param("interpolant", True, marks=pytest.mark.thorough),
        pytest.param("contrastive", False, marks=pytest.mark.thorough),
    ],
)
def test_fresh_noise_is_refused_where_noise_is_not_independent(name, refused):
    config = config_files.load(f"configs/digits.py:objective={name}")
    config.sampling.solver = choices.copy(choices.SOLVERS["dpmpp_2m_sde"])
    wired = wire(config, (8, 8, 1), of_classes(10))
    assert wired.recipe.solver.fresh_noise
    if refused:
        with pytest.raises(UserError, match="does not suit it; take one of ddim, euler"):
            check_wired(wired, 16, 6)
    else:
        check_wired(wired, 16, 6)


# Whole runs.

TINY = [
    "--config.num_steps=2",
    "--config.batch_size=16",
    "--config.model.hidden_size=16",
    "--config.model.depth=1",
    "--config.sampling.num_steps=2",
    "--config.evaluation.num_samples=20",
    "--config.evaluation.batch_size=104",  # as the picture, so that it is compiled once
    "--config.evaluation.solvers=()",
]


def run(script, *arguments):
    return cli.run(script.main, script.FLAGS, usage=script.USAGE, argv=arguments)


@pytest.mark.thorough
def test_reflow_from_run_to_run(tmp_path, capsys):
    teacher, student, file = tmp_path / "digits", tmp_path / "reflow", tmp_path / "pairs.npz"
    assert run(train, "--config=configs/digits.py", *TINY, f"--workdir={teacher}") == 0
    loaded = diffjax.load(teacher)
    assert run(reflow, f"--workdir={teacher}", "--num_pairs=20", "--batch_size=8",
               "--guidance_scale=1", f"--out={file}") == 0  # fmt: skip
    with np.load(file, allow_pickle=False) as saved:
        noise, images, labels = saved["source"], saved["image"], saved["label"]
    assert abs(noise.mean()) < 0.15
    assert abs(noise.std() - 1) < 0.1
    # The file's noise really is what the sampler starts from: walk from it by hand.
    wired = loaded.parts.wired
    predict = loaded.model().predict()
    x = integrate(
        lambda x, t: predict(x, jnp.full(len(x), t), jnp.asarray(labels)),
        loaded.recipe.solver, wired.path, jnp.array([1.0, 0.5]),
        jax.random.split(jax.random.key(0), 20), jnp.asarray(noise),
    )  # fmt: skip
    end = predict(x, jnp.full(20, 0.5), jnp.asarray(labels)).x0
    np.testing.assert_allclose(end, images, atol=1e-4)

    config = ["--config=configs/digits_reflow.py", f"--config.data.path={file}", *TINY]
    assert run(train, *config, f"--workdir={student}") == 0
    evaluation = json.loads((student / "evaluation.json").read_text())
    real = digits().train.fingerprint()
    assert evaluation["frechet_distance"]["provenance"]["reference_sha256"] == real
    assert run(sample, f"--workdir={student}", "--num_samples=4") == 0
    assert run(reflow, f"--workdir={student}", "--out=x.txt") == 2
    assert "should end in .npz" in capsys.readouterr().err
    # A data set of digits has no pairs.
    assert run(train, "--config=configs/digits.py:objective=reflow", "--dry_run") == 2
    assert "needs a source for each training image" in capsys.readouterr().err


@pytest.mark.thorough(tenth=False)
def test_instaflow_from_a_first_run_to_one_step(tmp_path, monkeypatch, capsys):
    """The commands of docs/examples.md: two trainings, pairs after each, and the third training.

    It begins with the reflowed weights, and draws by one evaluation of what it has learned.
    """
    root, weights = Path.cwd(), "--config.weights=live"
    monkeypatch.chdir(tmp_path)
    configs, some = f"--config={root}/configs", "--num_pairs=20"
    reflowed = ["--workdir=runs/reflow", "--config.data.path=first.npz"]
    last = ["--workdir=runs/insta", "--config.data.path=second.npz"]
    assert run(train, f"{configs}/digits.py", *TINY, weights, "--workdir=runs/digits") == 0
    assert run(reflow, "--workdir=runs/digits", some, "--out=first.npz") == 0
    assert run(train, f"{configs}/digits_reflow.py", *TINY, weights, *reflowed) == 0
    assert run(reflow, "--workdir=runs/reflow", some, "--num_steps=9", "--out=second.npz") == 0
    begin = "--config.init_from=runs/reflow:live"
    assert run(train, f"{configs}/digits_instaflow.py", *TINY, weights, *last, begin) == 0

    old, new = (diffjax.load(f"runs/{name}", weights="live") for name in ("reflow", "insta"))
    pairs = zip(*(jax.tree.leaves(each.weights("live")) for each in (old, new)), strict=True)
    moved = max(float(np.abs(one - other).max()) for one, other in pairs)
    assert 0.0 < moved < 2.01 * new.config.optimizer.learning_rate  # two steps of Adam
    second, nine = np.load("second.npz"), replace(old.recipe, num_steps=9)
    made = old.model().sample(nine, Request(second["label"], seed=1))
    np.testing.assert_allclose(second["image"], made, atol=1e-4)
    assert new.recipe.nfe == 1
    capsys.readouterr()
    out = "--out=one.npz"
    assert run(sample, "--workdir=runs/insta", "--num_samples=4", "--weights=live", out) == 0
    drawn = np.load("one.npz")
    labels = drawn["arr_1"]
    noise = Request(labels, seed=0).noise((8, 8, 1))
    end = new.model("live").predict()(noise, jnp.ones(4), jnp.asarray(labels, jnp.int32)).x0
    shown = drawn["arr_0"][..., :1] / 127.5 - 1.0  # 256 greys
    np.testing.assert_allclose(shown, np.clip(end, -1.0, 1.0), atol=0.0051)


@pytest.mark.thorough
def test_translation_from_training_to_samples(tmp_path, capsys):
    """By a bridge, which sees the source as it begins there; an interpolant begins there alone."""
    folder = tmp_path / "run"
    config = "--config=configs/digits_translation.py:objective=bridge"
    assert run(train, config, *TINY, "--config.sampling.guidance_scale=1.5",
               "--config.optimizer.warmup_steps=1", f"--workdir={folder}") == 0  # fmt: skip
    out = tmp_path / "x.png"
    assert run(sample, f"--workdir={folder}", "--num_samples=6", f"--out={out}") == 0
    with np.load(out.with_suffix(".npz")) as saved:
        images, labels, source = saved["images"], saved["labels"], saved["source"]
    test = translation(digits(), Coarse(2)).test
    batch: Any = test.gather(np.arange(6) * len(test) // 6)
    np.testing.assert_array_equal(source, to_float(batch["source"]))
    loaded = diffjax.load(folder)
    np.testing.assert_allclose(loaded.sample(labels, source=source), images, atol=1e-5)
    assert not np.allclose(loaded.sample(labels, source=-source), images, atol=2e-3)
    with pytest.raises(UserError, match="source=images"):
        loaded.sample(labels)
    with pytest.raises(UserError, match="source has shape"):
        loaded.sample(labels, source=source[:3])
    assert run(sample, f"--workdir={folder}", "--labels=3") == 2
    assert run(reflow, f"--workdir={folder}") == 2
    assert "start from noise" in capsys.readouterr().err
