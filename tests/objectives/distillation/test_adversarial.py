"""Adversarial distillation: its loss by NumPy, what each part moves, and samples of the data."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from diffjax.compiling import once
from diffjax.conditions import Classes
from diffjax.errors import UserError
from diffjax.objectives.base import Progress
from diffjax.objectives.distillation.adversarial import LatentAdversarial
from diffjax.objectives.distillation.discriminator import (
    DISCRIMINATOR,
    Head,
    gradient_penalty,
    hinge,
    init_head,
    logits,
)
from diffjax.process import paths, targets, times, weights
from diffjax.process.precond import Precond, TimeLabel
from diffjax.runs.setup import set_up
from diffjax.wiring import check_recipe

PRECOND = Precond(targets.Velocity(), TimeLabel(1.0))
LADD = LatentAdversarial(
    paths.Linear(), PRECOND, weights.Constant(), times.LogitNormal(1.0), depths=(1, 2), penalty=0.3
)
IMAGES = 0.5 * np.random.default_rng(0).standard_normal((8, 4, 6, 1)).astype(np.float32)
BATCH = {"image": jnp.asarray(IMAGES), "cond": jnp.arange(8) % 3}
OWN, TEACHER = 1.3, 0.7


def patches(x):
    """`[B, 4, 6, 1]` as tokens `[B, 2, 3, 4]`."""
    return x.reshape(-1, 2, 2, 3, 2).swapaxes(2, 3).reshape(-1, 2, 3, 4)


def network(params, x, noise_label, cond, *, key=None, hidden=False):
    """Two kinds of tokens, of which the second knows the noise level."""
    out = jnp.sin(params["w"] * x) + 0.1 * cond[:, None, None, None]
    if not hidden:
        return out
    assert key is None  # of the teacher, which is evaluated as it samples
    return out, (patches(out), patches(x) + noise_label[:, None, None, None])


def params_of(objective):
    return {"w": jnp.float32(OWN), **objective.init_params(jax.random.key(5), 4)}


@once()
def loss_gradient_and_draws(objective, params):
    key = jax.random.key(3)
    step_key, noise_key, *seen = jax.random.split(key, 4)
    progress = Progress(jnp.zeros(()), num_steps=1)

    def loss(params):
        teacher: Any = {"w": jnp.float32(TEACHER)}
        return objective(network, params, teacher, key, BATCH, progress)[0]

    t = objective.steps(step_key, 8, progress.fraction)
    eps = objective.noised(t, noise_key, BATCH).pair.eps
    again = [objective.at_random_times(each, BATCH) for each in seen]
    draws = [(jnp.ravel(each.c.t), each.pair.eps) for each in again]
    gradient = jax.grad(lambda params: jnp.mean(loss(params)))(params)
    return loss(params), gradient, (t, eps), draws


def head_in_numpy(p, tokens):
    """Logits `[B, rows, columns]`."""

    def leaky(x):
        return np.where(x > 0, x, 0.2 * x)

    norm = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
    norm = norm * p["norm"]["scale"] + p["norm"]["bias"]
    h = leaky(norm @ p["hidden"]["kernel"][0, 0] + p["hidden"]["bias"])
    wide, (rows, columns) = np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0))), h.shape[1:3]
    around = p["around"]["bias"] + sum(
        wide[:, i : i + rows, j : j + columns] @ p["around"]["kernel"][i, j]
        for i in range(3)
        for j in range(3)
    )
    h = (h + leaky(around)) / np.sqrt(2.0)
    return (h @ p["out"]["kernel"][0, 0] + p["out"]["bias"])[..., 0]


def penalty_in_numpy(p, tokens):
    squares = np.zeros(len(tokens))
    for place in np.ndindex(tokens.shape[1:]):
        step = np.zeros(tokens.shape)
        step[(slice(None), *place)] = 1e-5
        up, down = (head_in_numpy(p, tokens + sign * step).sum((1, 2)) for sign in (1.0, -1.0))
        squares += ((up - down) / 2e-5) ** 2
    return squares


def test_the_loss_is_that_of_the_papers():
    params = params_of(LADD)
    loss, gradient, (t, eps), draws = jax.device_get(loss_gradient_and_draws(LADD, params))
    assert set(np.unique(t)) <= {0.25, 0.5, 0.75, 1.0}
    heads = jax.tree.map(np.float64, params[DISCRIMINATOR])
    label, (u, noise), (v, other) = 0.1 * (np.arange(8) % 3)[:, None, None, None], *draws

    def over(x):
        return np.asarray(x, np.float64)[:, None, None, None]

    def tokens(w, x, u, noise):
        x_u = (1.0 - over(u)) * x + over(u) * noise
        return patches(np.sin(w * x_u) + label), patches(x_u) + over(u)

    def end(w):
        x_t = (1.0 - over(t)) * IMAGES + over(t) * eps
        return x_t - over(t) * (np.sin(w * x_t) + label)

    def of_network(w):
        fake = tokens(TEACHER, end(w), u, noise)
        scores = [head_in_numpy(heads[f"head_{i}"], h).mean((1, 2)) for i, h in enumerate(fake)]
        return -np.mean(scores, axis=0)

    expected = of_network(OWN)
    for i, (fake, real) in enumerate(
        zip(tokens(TEACHER, end(OWN), u, noise), tokens(TEACHER, IMAGES, v, other), strict=True)
    ):
        p = heads[f"head_{i}"]
        one, two = head_in_numpy(p, real), head_in_numpy(p, fake)
        wrong = np.maximum(0.0, 1.0 - one) + np.maximum(0.0, 1.0 + two)
        expected = expected + 0.5 * (wrong.mean((1, 2)) + 0.3 * penalty_in_numpy(p, real))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    # Of the network's own parameter only the first term has a gradient.
    slope = (of_network(OWN + 1e-5) - of_network(OWN - 1e-5)).mean() / 2e-5
    np.testing.assert_allclose(gradient["w"], slope, rtol=1e-3)


def test_the_hinge_loss_and_a_head_by_hand():
    real, fake = (jnp.array([[[-0.5, 3.0]]]), jnp.array([[[0.5, -2.0]]]))
    assert hinge(real, fake).tolist() == [(1.5 + 1.5) / 2]
    head = jax.jit(init_head, static_argnums=1)(jax.random.key(0), 4)
    zero = {**head, "out": jax.tree.map(jnp.zeros_like, head["out"])}
    tokens = jnp.asarray(patches(IMAGES))
    assert not np.any(logits(zero, tokens))
    assert not np.any(gradient_penalty(zero, tokens))
    assert Head().apply({"params": head}, tokens).shape == (8, 2, 3)  # type: ignore[union-attr]


@once()
def drawn(objective, fractions):
    keys = jax.random.split(jax.random.key(1), len(fractions))
    return jax.vmap(lambda key, fraction: objective.steps(key, 2000, fraction))(keys, fractions)


def test_most_examples_begin_in_pure_noise_after_warming_up_near_the_data():
    early, late = np.asarray(drawn(replace(LADD, warmup=0.1), jnp.array([0.05, 0.1])))
    for found, expected in ((early, [0.5, 0.5, 0.0, 0.0]), (late, [0.1, 0.1, 0.1, 0.7])):
        shares = [np.mean(found == t) for t in (0.25, 0.5, 0.75, 1.0)]
        np.testing.assert_allclose(shares, expected, atol=0.05)  # over 4 standard errors
    once_each = replace(LADD, num_steps=1, first=0.3)
    assert set(np.unique(drawn(once_each, jnp.zeros(1)))) == {1.0}


@once()
def pulls(objective, shift, keys):
    """Gradients of the heads' loss where samples are the data, shifted; `[n]` of each number."""
    heads = objective.init_params(jax.random.key(5), 4)[DISCRIMINATOR]
    small = {**heads["head_0"], "out": jax.tree.map(lambda x: 0.05 * x, heads["head_0"]["out"])}

    def one(key):
        image_key, key = jax.random.split(key)
        images = 0.4 + 0.3 * jax.random.normal(image_key, (16, 4, 6, 1))
        stripes = jnp.where(jnp.arange(6) % 2, 1.0, -1.0)[None, None, :, None]
        batch = {"image": images, "cond": jnp.zeros(16, jnp.int32)}

        def mean_loss(head):
            def exact(params, x, noise_label, cond, *, key=None, hidden=False):
                """From pure noise, where the end of the flow is 0.4 + 0.3·eps."""
                return (x, (patches(x),)) if hidden else 0.7 * x - 0.4 - shift * stripes

            params = {DISCRIMINATOR: {"head_0": head}}
            progress = Progress(jnp.zeros(()), num_steps=1)
            return jnp.mean(objective(exact, params, None, key, batch, progress)[0])

        gradient = jax.grad(mean_loss)(small)
        return jnp.stack([jnp.sum(gradient[name]["bias"]) for name in ("out", "hidden", "around")])

    return jax.lax.map(one, keys)


@pytest.mark.thorough(tenth=False)
def test_heads_learn_nothing_from_samples_of_the_data_and_do_from_others():
    """Where no logit is beyond ±1 the hinge loss is the difference of two means."""
    objective = replace(LADD, depths=(), penalty=0.0, num_steps=1)
    keys = jax.random.split(jax.random.key(2), 128)

    def z(shift):
        found = np.asarray(pulls(objective, shift, keys))
        deviation = np.maximum(found.std(axis=0), 1e-6) / np.sqrt(len(found))
        return np.abs(found.mean(axis=0) / deviation)

    assert z(0.0).max() < 4.0
    assert z(0.5).max() > 10.0


def config_of(**objective):
    config = digits.get_config("objective=ladd")
    config.model.update(hidden_size=16, depth=2, num_heads=2)
    config.teacher = "runs/teacher"
    config.objective.update(objective)
    return config


def test_each_depth_has_a_head_and_the_heads_an_optimizer_of_their_own():
    setup = set_up(config_of(depths=(1, 2)), (8, 8, 1), Classes(10))
    wired = setup.wired
    assert wired.own_names == (DISCRIMINATOR,)
    assert wired.params_shape[DISCRIMINATOR]["head_1"]["out"]["kernel"].shape == (1, 1, 16, 1)
    assert wired.network.hidden_depths == (1, 2)  # type: ignore[attr-defined]
    assert hasattr(setup.abstract.opt_state, "always")
    traits = wired.objective.traits
    assert (traits.has_teacher, traits.distils, traits.network_every) == (True, True, 1)
    check_recipe(wired.recipe, wired)
    with pytest.raises(UserError, match="no tokens after 3 blocks in a network of depth=2"):
        set_up(config_of(depths=(1, 3)), (8, 8, 1), Classes(10))


@pytest.mark.thorough
def test_a_head_has_the_width_of_a_unets_middle():
    config = digits.get_config("objective=ladd,model=unet")
    config.teacher = "runs/teacher"
    wired = set_up(config, (8, 8, 1), Classes(10)).wired
    assert wired.params_shape[DISCRIMINATOR]["head_0"]["norm"]["scale"].shape == (64,)
