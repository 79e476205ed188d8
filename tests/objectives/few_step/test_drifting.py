"""Drifting: its field by hand, its groups, its guidance, and samples that are already the data."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import choices
from diffjax.compiling import once
from diffjax.errors import UserError
from diffjax.objectives.base import Progress
from diffjax.objectives.few_step.drifting import Drifting
from diffjax.process import paths, targets, times, weights
from diffjax.process.paths import Pair
from diffjax.process.precond import Meaning, Precond, TimeLabel
from diffjax.sampling import grids
from diffjax.sampling.sample import Recipe, sample
from diffjax.spec import build
from tests.objectives.few_step.test_flow_maps import with_slope

DRIFTING = Drifting(
    paths.Linear(), Precond(targets.Clean(), TimeLabel()), weights.Constant(), times.Uniform()
)
BATCH = {
    "image": jnp.asarray(0.5 * np.random.default_rng(0).standard_normal((12, 2)), jnp.float32),
    "cond": jnp.arange(12) % 3,
}
OWN = 1.3


def generator(params, x, noise_label, cond, *, key=None):
    return jnp.sin(params * x) + 0.1 * cond[:, None]


@once()
def loss_slope_and_noise(objective, params, batch):
    key = jax.random.key(3)

    def loss(params):
        return objective(generator, params, params, key, batch, Progress(jnp.zeros(())))[0]

    n = objective.generated * len(batch["image"])
    noise = jax.random.normal(jax.random.split(key)[0], (n, 2))
    return *with_slope(loss, params), noise


def softmax(x, axis):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def goal_and_unit(samples, cond, images, of_images, temperatures, scale_of_guidance):
    """Where each sample should be, in units of the mean distance over the root of D."""
    n, m = len(samples), len(images)
    targets = np.concatenate([samples, images, images])
    weight = np.zeros((n, n + 2 * m))
    for i in range(n):
        same = cond == cond[i]
        weight[i, :n] = same
        weight[i, n : n + m] = (scale_of_guidance - 1.0) * (same.sum() - 1) / m
        weight[i, n + m :] = of_images == cond[i]
    distance = np.linalg.norm(samples[:, None] - targets[None], axis=-1)
    scale = (distance * weight).sum() / weight.sum()
    there = weight > 0
    there[np.arange(n), np.arange(n)] = False
    unit = scale / np.sqrt(2)
    goal = samples / unit
    for temperature in temperatures:
        logits = -(distance / scale + np.where(there, 0.0, 100.0)) / temperature
        kernel = np.sqrt(np.maximum(softmax(logits, 1) * softmax(logits, 0), 1e-6)) * weight
        field = np.zeros_like(samples)
        for i in range(n):
            for j in range(n + m):
                for k in range(n + m, n + 2 * m):
                    field[i] += kernel[i, j] * kernel[i, k] * (targets[k] - targets[j]) / unit
        goal = goal + field / np.sqrt(np.mean(field**2))
    return goal, unit


@pytest.mark.parametrize(
    ("generated", "guidance"), [(1, 1.0), pytest.param(2, 2.5, marks=pytest.mark.thorough)]
)
def test_samples_move_along_the_field_of_the_paper(generated, guidance):
    objective = replace(
        DRIFTING, generated=generated, guidance_scale=guidance, temperatures=(0.1, 0.4)
    )
    with jax.enable_x64(True):
        loss, slope, noise = jax.device_get(loss_slope_and_noise(objective, OWN, BATCH))
    cond, noise = np.repeat(np.asarray(BATCH["cond"]), generated), noise.astype(np.float64)

    def samples(own):
        return np.sin(own * noise) + 0.1 * cond[:, None]

    images, of_images = (np.asarray(BATCH[name], np.float64) for name in BATCH)
    goal, unit = goal_and_unit(
        samples(OWN), cond, images, of_images, objective.temperatures, guidance
    )

    def by_hand(own):
        error = samples(own) / unit - goal
        return np.square(error).mean(axis=1).reshape(12, generated).mean(axis=1)

    np.testing.assert_allclose(loss, by_hand(OWN), rtol=1e-4)
    expected = (by_hand(OWN + 1e-6) - by_hand(OWN - 1e-6)) / 2e-6
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)


def test_features_of_several_kinds_are_added():
    class Twice:
        def __call__(self, images):
            row = images.reshape(len(images), 1, -1)
            return [row, jnp.concatenate([row, row], axis=1)]

    @jax.jit
    def both():
        rest = OWN, OWN, jax.random.key(0), BATCH, Progress(jnp.zeros(()))
        return [
            objective(generator, *rest)[0]
            for objective in (DRIFTING, replace(DRIFTING, features=Twice()))
        ]

    losses = both()
    np.testing.assert_allclose(losses[1], 2.0 * losses[0], rtol=2e-3)


def test_it_samples_in_one_evaluation_whatever_the_grid():
    assert DRIFTING.traits.meaning is Meaning.END_OF_FLOW
    solver = build(choices.copy(choices.SOLVERS[DRIFTING.traits.solver]))
    recipe = Recipe(solver, grids.Power(), num_steps=9)
    path = DRIFTING.path
    assert recipe.nfe == 1

    def denoise(x, t):
        return Pair(0.0 * x + t, x)

    x, keys = jnp.ones((2, 3)), jax.random.split(jax.random.key(0), 2)
    samples = sample(denoise, solver, path, recipe.times(path), keys, x)
    np.testing.assert_array_equal(samples, path.t_noise)  # the time of the last evaluation


def test_what_it_needs():
    key, progress = jax.random.key(0), Progress(jnp.zeros(()))
    alone, nothing = {name: x[:1] for name, x in BATCH.items()}, replace(DRIFTING, temperatures=())
    with pytest.raises(UserError, match="drifting needs other examples of the batch"):
        DRIFTING(generator, OWN, OWN, key, alone, progress)
    with pytest.raises(UserError, match="drifting needs a temperature"):
        nothing(generator, OWN, OWN, key, BATCH, progress)


@once()
def pulls(objective, shift, keys):
    """The gradients by a shift of the samples of a Gaussian of which the images are, `[n]`."""

    def one(key):
        data_key, key = jax.random.split(key)
        data = 0.4 + 0.3 * jax.random.normal(data_key, (64, 1))
        batch = {"image": data, "cond": jnp.zeros(64, jnp.int32)}

        def mean_loss(shift):
            def network(params, x, noise_label, cond, *, key=None):
                return 0.4 + shift + 0.3 * x

            progress = Progress(jnp.zeros(()))
            return jnp.mean(objective(network, None, None, key, batch, progress)[0])

        return jax.grad(mean_loss)(shift)

    return jax.lax.map(one, keys)


@pytest.mark.thorough(tenth=False)
def test_samples_of_the_data_do_not_move_on_average_and_others_move_to_it():
    keys = jax.random.split(jax.random.key(1), 128)

    def z(shift):
        found = np.asarray(pulls(DRIFTING, shift, keys))
        return found.mean() / (found.std() / np.sqrt(len(found)))

    assert abs(z(0.0)) < 4.0
    assert z(0.1) > 10.0
    assert z(-0.1) < -10.0
