"""Consistency training: its pairs, its loss by hand, its limit, and the exact end of the flow."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from diffjax.compiling import once
from diffjax.objectives.base import Progress
from diffjax.objectives.distances import MeanSquare, PseudoHuber
from diffjax.objectives.few_step.consistency import (
    Consistency,
    Doubling,
    FromTeacher,
    Neighbours,
    Shrinking,
    SquareRoot,
)
from diffjax.objectives.few_step.continuous_consistency import ContinuousConsistency
from diffjax.oracle import analytic
from diffjax.oracle.verify import verify_objective
from diffjax.process import paths, schedules, targets, times, weights
from diffjax.process.paths import Pair
from diffjax.process.precond import LogSNRLabel, Precond, TimeLabel, UnitVariance

GAUSSIAN = analytic.Gaussian(jnp.array([0.4, -0.3]), jnp.array([[0.2, 0.05], [0.05, 0.1]]))
F = Precond(targets.F(), LogSNRLabel(-0.125), UnitVariance())


def of_edm(density=None, **parts):
    density = density or times.UniformRoot()
    return Consistency(schedules.EDM(), F, weights.Constant(), density, **parts)


def continuous(**parts):
    precond = Precond(targets.V(), TimeLabel(1.0))
    density = times.LogNormal(-1.0, 1.4)
    return ContinuousConsistency(paths.Cosine(), precond, weights.Constant(), density, **parts)


def smooth_network(params, x, noise_label, cond, *, key=None):
    return jnp.sin(params * x + 2.0 * noise_label[:, None]) + 0.3 * x * noise_label[:, None]


def smooth_in_numpy(params, x, label):
    return np.sin(params * x + 2.0 * label[:, None]) + 0.3 * x * label[:, None]


def end_in_numpy(params, x, sigma):
    """Karras et al. 2022, table 1: `c_skip·x + c_out·F(c_in·x, ¼·log σ)` with sigma_data = ½."""
    c_skip = 0.25 / (sigma**2 + 0.25)
    c_out, c_in = sigma * 0.5 / np.sqrt(sigma**2 + 0.25), 1.0 / np.sqrt(sigma**2 + 0.25)
    out = smooth_in_numpy(params, c_in[:, None] * x, 0.25 * np.log(sigma))
    return c_skip[:, None] * x + c_out[:, None] * out


@once()
def loss_and_its_parts(objective, params, teacher_params, batch, fraction):
    key = jax.random.key(3)
    progress = Progress(fraction, num_steps=1)
    found = objective(smooth_network, params, teacher_params, key, batch, progress)
    time_key, key = jax.random.split(key)
    n = len(batch["image"])
    t = objective.times.quantile(objective.uniforms(time_key, n), objective.path)
    noise = jax.random.normal(jax.random.split(key, 3)[0], batch["image"].shape)
    return found[0], t, noise


def levels_of_karras(n):
    """Karras et al. 2022, equation 5, from 0.002 to 80, upwards."""
    return (0.002 ** (1 / 7) + np.arange(n) / (n - 1) * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7


def neighbours(sigma, n):
    levels = levels_of_karras(n)
    above = np.clip(np.searchsorted(levels, sigma, side="right"), 1, n - 1)
    return levels[above], levels[above - 1]


def shrunk(sigma, stage):
    """ECT, equation 6 with the authors' q = 2, k = 8 and b = 1."""
    n = 1.0 + 8.0 / (1.0 + np.exp(sigma))
    return sigma, sigma * np.maximum(1.0 - n / 2.0 ** (stage + 1), 0.0)


def squares(d):
    return (d**2).sum(axis=1)


HALF_WAY = 0.5
CASES = {
    # N(k) of CT is ⌈√(½·(151² - 2²) + 2²) - 1⌉ + 1 = 107 half way.
    "consistency": (
        of_edm(averaged_target=True),
        lambda sigma: neighbours(sigma, 107),
        lambda d, gap: squares(d) / 2,
    ),
    # log2(1280/10) + 1 = 8 stages; half way there are 10·2⁴ intervals. c = 0.00054·√2.
    "ict": (
        of_edm(
            times.LogNormal(-1.1, 2.0),
            pairs=Neighbours(Doubling()),
            metric=PseudoHuber(),
            power=1.0,
        ),
        lambda sigma: neighbours(sigma, 161),
        lambda d, gap: (np.sqrt(squares(d) + 2 * 0.00054**2) - 0.00054 * np.sqrt(2)) / gap,
    ),
    "ect": (
        of_edm(times.LogNormal(-1.1, 2.0), pairs=Shrinking(), metric=PseudoHuber(0.0), power=1.0),
        lambda sigma: shrunk(sigma, 4),
        lambda d, gap: np.sqrt(squares(d)) / gap,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_the_papers(name):
    objective, pairs, distance = CASES[name]
    x0 = 0.5 * np.random.default_rng(0).standard_normal((64, 2))
    batch = {"image": x0.astype(np.float32), "cond": np.arange(64) % 3}
    own, averages = 1.3, 0.9
    found, t, noise = jax.device_get(loss_and_its_parts(objective, own, averages, batch, HALF_WAY))
    sigma, earlier = pairs(t.astype(np.float64))
    target = averages if objective.averaged_target else own
    safe = np.maximum(earlier, 0.002)[:, None]
    before = np.where(
        earlier[:, None] < 0.0019, x0, end_in_numpy(target, x0 + safe * noise, safe[:, 0])
    )
    d = end_in_numpy(own, x0 + sigma[:, None] * noise, sigma) - before
    # Neighbours are 1e-3 apart, and the times of float32 1e-7.
    np.testing.assert_allclose(found, distance(d, sigma - earlier), rtol=5e-3, atol=1e-5)


def test_the_curricula_are_those_of_the_papers():
    fractions = np.linspace(0.0, 1.0, 401)
    k, doubled = np.arange(401), np.array([Doubling()(x) for x in fractions])
    # iCT, equation 6, with K = 400 and K' = ⌊400/(log2(1280/10) + 1)⌋ = 50.
    np.testing.assert_array_equal(doubled, np.minimum(10 * 2 ** (k // 50), 1280) + 1)
    # CT, appendix C.
    roots = np.array([SquareRoot()(x) for x in fractions])
    expected = np.ceil(np.sqrt(k / 400 * (151**2 - 2**2) + 2**2) - 1) + 1
    assert (np.abs(roots - expected) <= (np.abs(expected % 1) > 0)).all()


def test_a_level_is_as_likely_as_the_density_between_its_neighbours():
    """iCT, equation 7: in proportion to a difference of two error functions."""
    n, size = 12, 200_000
    path, density = schedules.EDM(), times.LogNormal(-1.1, 2.0)

    @jax.jit
    def drawn(u):
        pairs = Neighbours(Doubling(11.0, 11.0))
        return pairs(density.quantile(u, path), jnp.array(0.002), jnp.array(80.0), jnp.array(0.0))

    above, below = jax.device_get(drawn((np.arange(size) + 0.5) / size))
    levels = levels_of_karras(n)
    mass = np.diff(erf((np.log(levels) + 1.1) / (np.sqrt(2.0) * 2.0)))
    found = [(np.abs(above / level - 1.0) < 1e-3).mean() for level in levels[1:]]
    np.testing.assert_allclose(found, mass / mass.sum(), atol=2e-4)
    assert (below < above).all()


def test_the_uniform_density_of_roots_is_that_of_the_levels():
    """Each interval between neighbours is as likely as any other."""
    path = schedules.EDM()
    t = jax.jit(lambda u: times.UniformRoot().quantile(u, path))(np.arange(17) / 16.0001)
    np.testing.assert_allclose(t, levels_of_karras(17), rtol=2e-3)


def test_equal_images_have_no_gradient():
    gradient = jax.grad(lambda d: PseudoHuber(0.0)(d, 0.0 * d).sum())(jnp.zeros((2, 3)))
    assert np.isfinite(gradient).all()
    assert not gradient.any()


@once()
def tangent_and_its_parts(objective, batch, fraction):
    """Loss and gradient of the only parameter, and the noise and times behind them."""
    key = jax.random.key(5)

    def loss(params):
        progress = Progress(fraction, num_steps=1)
        return objective(smooth_network, params, params, key, batch, progress)[0].sum()

    time_key, key_ = jax.random.split(key)
    n = len(batch["image"])
    t = objective.times.quantile(objective.uniforms(time_key, n), objective.path)
    noise = jax.random.normal(jax.random.split(key_, 3)[0], batch["image"].shape)
    return *jax.value_and_grad(loss)(1.3), t, noise


@pytest.mark.parametrize(
    "normalised", [True, pytest.param(False, marks=pytest.mark.thorough(tenth=False))]
)
def test_scm_moves_against_the_derivative_along_the_flow(normalised):
    """Algorithm 1 of Lu & Song with derivatives by differences, and the gradient by hand."""
    objective = continuous(normalised=normalised, warm_up=0.5)
    fraction = 0.2  # so the derivative of the network counts 0.4 times
    x0 = 0.5 * np.random.default_rng(1).standard_normal((16, 2))
    batch = {"image": x0.astype(np.float32), "cond": np.zeros(16, np.int32)}
    loss, slope, t, z = jax.device_get(tangent_and_its_parts(objective, batch, fraction))
    t = t.astype(np.float64)
    angle = 0.5 * np.pi * t

    def network(params, h):
        a, s = np.cos(angle + h)[:, None], np.sin(angle + h)[:, None]
        return smooth_in_numpy(params, a * x0 + s * z, (angle + h) * 2.0 / np.pi)

    a, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x, dx, F = a * x0 + s * z, a * z - s * x0, network(1.3, 0.0)
    dF = (network(1.3, 1e-5) - network(1.3, -1e-5)) / 2e-5
    g = -(a**2) * (F - dx) - 0.4 * a * s * (x + dF)
    if normalised:
        g = g / (np.sqrt(squares(g))[:, None] + 0.1)
    np.testing.assert_allclose(loss, squares(g).sum() / 2, rtol=1e-3)
    by_parameter = (network(1.3 + 1e-6, 0.0) - network(1.3 - 1e-6, 0.0)) / 2e-6
    np.testing.assert_allclose(slope, np.sum(-2.0 * g * by_parameter) / 2, rtol=2e-3)


def test_along_a_teacher_x_moves_by_its_prediction():
    """A teacher of one image: all earlier levels are on the line to it, and it is the end."""
    end = 0.25

    def knows(params, x, noise_label, cond, *, key=None):
        sigma = jnp.exp(4.0 * noise_label)[:, None]
        x_t = x * jnp.sqrt(sigma**2 + 0.25)
        # F of an exact x0: (x0 - c_skip·x)/c_out.
        return (end - 0.25 / (sigma**2 + 0.25) * x_t) / (sigma * 0.5 / jnp.sqrt(sigma**2 + 0.25))

    objective = of_edm(prediction=FromTeacher())
    batch = {"image": np.ones((8, 2), np.float32), "cond": np.zeros(8, np.int32)}
    progress = Progress(jnp.array(0.5), num_steps=1)
    loss, _ = jax.jit(lambda batch: objective(knows, {}, {}, jax.random.key(0), batch, progress))(
        batch
    )
    np.testing.assert_allclose(loss, 0.0, atol=1e-4)
    traits = objective.traits
    assert (traits.distils, traits.has_teacher) == (True, True)
    assert not of_edm().traits.has_teacher


def test_guidance_is_built_into_the_teachers_prediction():
    def teacher(x, t, cond):
        value = 1.0 if cond is None else 3.0
        return Pair(value + 0.0 * x, value + 1.0 + 0.0 * x)

    noised = type("Noised", (), {"cond": 0})
    pair = FromTeacher(2.0)(teacher, noised, jnp.zeros((2, 2)), jnp.zeros(2))
    np.testing.assert_array_equal(pair.x0, 5.0)  # 3 + (2 - 1)·(3 - 1)
    np.testing.assert_array_equal(pair.eps, 6.0)


AT_THE_END = {
    "consistency": of_edm(),
    "ict": replace(CASES["ict"][0], metric=MeanSquare()),
    "ect": replace(CASES["ect"][0], metric=MeanSquare()),
    "scm": continuous(normalised=False),
}


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("name", AT_THE_END)
def test_the_exact_end_of_the_flow_is_a_minimum_at_the_end_of_training(name):
    found = verify_objective(AT_THE_END[name], GAUSSIAN, num_batches=16, limit=0.2, fraction=1.0)
    assert found.passed, found


@pytest.mark.thorough
def test_a_derivative_with_the_wrong_sign_is_seen(monkeypatch):
    jvp = jax.jvp

    def wrong(function, primals, tangents):
        out, change = jvp(function, primals, tangents)
        return out, -change if function.__name__ == "network" else change

    monkeypatch.setattr(jax, "jvp", wrong)
    found = verify_objective(
        continuous(normalised=False), GAUSSIAN, num_batches=16, batch_size=504, fraction=1.0
    )
    assert not found.passed
