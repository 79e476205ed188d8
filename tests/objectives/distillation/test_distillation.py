"""Distillation of guidance, of two steps to one, and to latent consistency models: by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from diffjax import lookup
from diffjax.compiling import once
from diffjax.conditions import Classes
from diffjax.conditions.guided import split
from diffjax.objectives.base import Progress
from diffjax.objectives.denoising import Noising
from diffjax.objectives.distillation.denoisers import GuidanceDistillation, ProgressiveDistillation
from diffjax.objectives.distillation.latent_consistency import LatentConsistency
from diffjax.objectives.few_step.consistency import FromTeacher
from diffjax.objectives.wrappers import EmbeddedGuidance
from diffjax.process import beta_tables, paths, targets, times, weights
from diffjax.process.precond import Precond, TimeLabel
from diffjax.wiring import check_recipe, wire

OF_V = Precond(targets.V(), TimeLabel(1.0))
SNR = weights.TruncatedSNR()
TABLE = beta_tables.ScaledLinearBetas()
OF_NOISE = Precond(targets.Noise(), TimeLabel(1.0))
BATCH = {
    "image": 0.5 * np.random.default_rng(0).standard_normal((32, 2)),
    "cond": np.arange(32) % 3,
}
STUDENT, TEACHER = 1.3, 0.8


def smooth_network(params, x, noise_label, cond, *, key=None):
    cond, scale = split(cond)
    shift = 0.2 if cond is None else 0.1 * cond[:, None]
    if scale is not None:
        shift = shift + 0.05 * scale[:, None]
    return jnp.sin(params * x + 2.0 * noise_label[:, None]) + shift


def smooth_in_numpy(params, x, t, shift):
    return np.sin(params * x + 2.0 * t[:, None]) + shift


@once()
def loss_and_draws(objective, key):
    progress = Progress(jnp.zeros(()), num_steps=1)
    loss, metrics = objective(smooth_network, STUDENT, TEACHER, key, BATCH, progress)
    share = jnp.zeros(32)
    if isinstance(objective, EmbeddedGuidance):
        scale_key, key = jax.random.split(key)
        objective, share = objective.objective, jax.random.uniform(scale_key, (32,))
    assert isinstance(objective, Noising)
    time_key, noise_key = jax.random.split(key)
    u = objective.uniforms(time_key, 32)
    noised = objective.noised(jnp.full(32, 0.5), noise_key, BATCH)
    return loss, metrics, u, noised.pair.eps, share[:, None]


def found(objective):
    with jax.enable_x64(True):
        return jax.device_get(loss_and_draws(objective, jax.random.key(3)))


def cosine(t):
    return np.cos(0.5 * np.pi * t)[:, None], np.sin(0.5 * np.pi * t)[:, None]


def pair_in_numpy(params, x, t, shift):
    """x0 and noise of a network of v on the cosine path."""
    (a, s), v = cosine(t), smooth_in_numpy(params, x, t, shift)
    return a * x - s * v, s * x + a * v


def weighted(x, t, x0):
    """`max(SNR, 1)·|x0_net - x0|²`, whose mean over pixels is the loss."""
    a, s = cosine(t)
    own = pair_in_numpy(STUDENT, x, t, 0.1 * BATCH["cond"][:, None])[0]
    return (np.maximum((a / s) ** 2, 1.0) * (own - x0) ** 2).mean(axis=1)


@pytest.mark.parametrize("num_steps", [pytest.param(1, marks=pytest.mark.thorough), 4])
def test_a_step_of_the_student_ends_where_two_of_the_teacher_do(num_steps):
    objective = ProgressiveDistillation(
        paths.Cosine(), OF_V, SNR, times.Uniform(), num_steps=num_steps
    )
    loss, metrics, u, eps, _ = found(objective)
    grid = 0.999 * (1.0 - np.arange(2 * num_steps + 1) / (2 * num_steps))
    first = 2 * np.floor(u * num_steps).astype(int)
    t, middle, end = (grid[first + i] for i in range(3))
    np.testing.assert_allclose(metrics["interval"], np.stack([t, end], axis=1), atol=1e-6)
    (a, s), (a_end, s_end) = cosine(t), cosine(end)
    shift = 0.1 * BATCH["cond"][:, None]
    x = a * BATCH["image"] + s * eps
    z = x
    for begin, to in ((t, middle), (middle, end)):
        x0, noise = pair_in_numpy(TEACHER, z, begin, shift)
        z = cosine(to)[0] * x0 + cosine(to)[1] * noise
    x0 = (z - s_end / s * x) / (a_end - s_end / s * a)
    np.testing.assert_allclose(loss, weighted(x, t, x0), rtol=1e-4)
    # DDIM from t along this x0, as `sample` walks, ends in z.
    np.testing.assert_allclose(a_end * x0 + s_end / s * (x - a * x0), z, atol=1e-9)


def test_guidance_is_what_the_student_predicts_alone():
    guided = GuidanceDistillation(
        paths.Cosine(), OF_V, SNR, times.Uniform(), prediction=FromTeacher(2.5)
    )
    loss, _, u, eps, _ = found(guided)
    t = 0.001 + (0.999 - 0.001) * u
    a, s = cosine(t)
    x, shift = a * BATCH["image"] + s * eps, 0.1 * BATCH["cond"][:, None]
    on, off = (pair_in_numpy(TEACHER, x, t, each)[0] for each in (shift, 0.2))
    np.testing.assert_allclose(loss, weighted(x, t, on + 1.5 * (on - off)), rtol=1e-4)


def test_a_latent_consistency_model_is_the_same_before_and_after_a_guided_step():
    """By the betas of Stable Diffusion, whose step number k is at time k/1,000.

    The student has the scale of guidance as an input, and the teacher has not.
    """
    objective = LatentConsistency(
        TABLE, OF_NOISE, weights.Constant(), times.Uniform(), num_steps=20
    )
    loss, metrics, u, eps, share = found(EmbeddedGuidance(objective, 3.0, 15.0))
    scale = 3.0 + 12.0 * share
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.concatenate([[1.0], np.cumprod(1.0 - betas)])
    late = 50 * (np.floor(u * 20).astype(int) + 1)
    early = np.maximum(late - 50, 1)
    both = np.stack([late, early], axis=1) / 1000
    np.testing.assert_allclose(metrics["interval"], both, atol=1e-6)

    def parts(step):
        return np.sqrt(kept[step])[:, None], np.sqrt(1.0 - kept[step])[:, None]

    def f(params, x, step, shift):
        (a, s), h = parts(step), 10.0 * (step - 1.0)[:, None]
        x0 = (x - s * smooth_in_numpy(params, x, step / 1000, shift)) / a
        return 0.25 / (h**2 + 0.25) * x + h / np.sqrt(h**2 + 0.25) * x0

    (a, s), (a_to, s_to) = parts(late), parts(early)
    x, shift = a * BATCH["image"] + s * eps, 0.1 * BATCH["cond"][:, None]
    on, off = (smooth_in_numpy(TEACHER, x, late / 1000, each) for each in (shift, 0.2))
    noise = off + scale * (on - off)
    moved = a_to * (x - s * noise) / a + s_to * noise
    own = shift + 0.05 * scale
    gap = f(STUDENT, x, late, own) - f(STUDENT, moved, early, own)
    expected = (np.sqrt(gap**2 + 1e-6) - 1e-3).mean(axis=1)
    np.testing.assert_allclose(loss, expected, rtol=2e-3, atol=1e-6)


def test_at_the_least_time_a_latent_consistency_model_is_its_input():
    objective = LatentConsistency(TABLE, OF_NOISE, weights.Constant(), times.Uniform())
    x = jnp.ones((2, 3))
    ends = objective.bounded(x, 5.0 * x, jnp.array([TABLE.t_min, 0.02]))
    np.testing.assert_allclose(ends[0], 1.0)
    np.testing.assert_allclose(ends[1], 5.0, rtol=1e-4)


@pytest.mark.parametrize("name", ["lcm", "progressive", "guidance"])
def test_the_named_ones_distil_a_run(name):
    config = digits.get_config(f"objective={name},model=dit")
    config.model.update(hidden_size=16, depth=1)
    wired = wire(config, (8, 8, 1), Classes(10))
    traits = wired.objective.traits
    assert (traits.distils, traits.has_teacher, traits.forward_mode) == (True, True, False)
    assert lookup.solver_called(traits.solver).needs is traits.meaning
    check_recipe(wired.recipe, wired)
