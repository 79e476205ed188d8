"""Distribution matching: both losses by hand, which parameters they move, and in which turns."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits
from diffjax.compiling import once
from diffjax.conditions import Classes
from diffjax.errors import UserError
from diffjax.objectives.base import Progress
from diffjax.objectives.distillation.distribution_matching import DistributionMatching
from diffjax.objectives.distillation.score_regularised import ScoreRegularised
from diffjax.objectives.few_step.consistency import FromTeacher
from diffjax.objectives.few_step.continuous_consistency import ContinuousConsistency
from diffjax.optimizers.adam import Adam
from diffjax.optimizers.descent import descent
from diffjax.optimizers.schedule_free import ScheduleFreeAdamW
from diffjax.optimizers.turns import in_turns
from diffjax.process import paths, schedules, targets, times, weights
from diffjax.process.precond import LogSNRLabel, Precond, TimeLabel, UnitVariance
from diffjax.runs.setup import set_up

F = Precond(targets.F(), LogSNRLabel(-0.125), UnitVariance())
BATCH = {"image": jnp.zeros((32, 2)), "cond": jnp.arange(32) % 3}
PARAMS: Any = {"w": jnp.array(1.3), "fake_score": {"w": jnp.array(0.9)}}
TEACHER = {"w": jnp.array(0.7)}


def of(**parts):
    density = times.UniformRoot()
    return DistributionMatching(schedules.EDM(), F, weights.Constant(), density, **parts)


def smooth_network(params, x, noise_label, cond, *, key=None):
    return jnp.sin(params["w"] * x + 2.0 * noise_label[:, None])


def end_in_numpy(w, x, sigma):
    """Karras et al. 2022, table 1, with sigma_data = ½."""
    sigma = np.reshape(sigma, (-1, 1))
    c_skip = 0.25 / (sigma**2 + 0.25)
    c_out, c_in = sigma * 0.5 / np.sqrt(sigma**2 + 0.25), 1.0 / np.sqrt(sigma**2 + 0.25)
    return c_skip * x + c_out * np.sin(w * c_in * x + 0.5 * np.log(sigma))


@once()
def loss_gradient_and_draws(objective, params):
    key = jax.random.key(3)

    def loss(params):
        progress = Progress(jnp.zeros(()), num_steps=1)
        return objective(smooth_network, params, TEACHER, key, BATCH, progress)[0]

    sample_key, score_key, fake_key, _ = jax.random.split(key, 4)
    noise = jax.random.normal(jax.random.split(sample_key, 3)[2], (32, 2))
    draws = []
    for each in (score_key, fake_key):
        time_key, noise_key = jax.random.split(each)
        u = objective.uniforms(time_key, 32)
        draws += [u, objective.noised(jnp.ones(32), noise_key, BATCH).pair.eps]

    def twice(params):
        found = loss(params)
        return found, found

    gradient, losses = jax.jacfwd(twice, has_aux=True)(params)
    return losses, gradient, noise, draws


def level(u):
    return (0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7


def test_the_losses_and_their_gradients_are_those_of_the_paper():
    with jax.enable_x64(True):
        params = jax.tree.map(np.float64, PARAMS)
        found = jax.device_get(loss_gradient_and_draws(of(), params))
    loss, gradient, noise, (u, eps, fake_u, fake_eps) = found
    x = end_in_numpy(1.3, 80.0 * noise, np.full(32, 80.0))
    sigma = level(0.02 + 0.96 * u)
    x_t = x + sigma[:, None] * eps
    real, fake = (end_in_numpy(w, x_t, sigma) for w in (0.7, 0.9))
    g = (fake - real) / np.abs(x - real).mean(axis=1, keepdims=True)

    def of_fake(w):
        sigma = level(fake_u)[:, None]
        end = end_in_numpy(w, x + sigma * fake_eps, sigma)
        return ((sigma**2 + 0.25) / (0.5 * sigma) ** 2 * (end - x) ** 2).mean(axis=1)

    np.testing.assert_allclose(loss, 0.5 * (g**2).mean(axis=1) + of_fake(0.9), rtol=1e-4)
    by_w = np.subtract(
        *(end_in_numpy(1.3 + h, 80.0 * noise, np.full(32, 80.0)) for h in (1e-6, -1e-6))
    )
    # The generator's parameter has no gradient of the fake score's loss, and the other way round.
    by_hand = (g * by_w / 2e-6).mean(axis=1)
    np.testing.assert_allclose(gradient["w"], by_hand, rtol=1e-4, atol=1e-7)
    slope = (of_fake(0.9 + 1e-5) - of_fake(0.9 - 1e-5)) / 2e-5
    np.testing.assert_allclose(gradient["fake_score"]["w"], slope, rtol=1e-3, atol=1e-5)


def test_where_the_fake_score_is_the_teachers_the_generator_stays():
    with jax.enable_x64(True):
        params = jax.tree.map(np.float64, {**PARAMS, "fake_score": TEACHER})
        gradient = jax.device_get(loss_gradient_and_draws(of(), params)[1])
    np.testing.assert_array_equal(gradient["w"], 0.0)
    assert np.abs(gradient["fake_score"]["w"]).min() > 0.0


def test_of_several_steps_each_example_has_one():
    """A network of one end: after any number of steps a sample is that end."""
    objective = of(num_steps=3)
    seen = []

    def knows(params, x, noise_label, cond, *, key=None):
        sigma = jnp.exp(4.0 * noise_label)[:, None]
        seen.append(noise_label.shape)
        x_t = x * jnp.sqrt(sigma**2 + 0.25)
        skipped = 0.25 / (sigma**2 + 0.25) * x_t
        return (0.3 - skipped) / (sigma * 0.5 / jnp.sqrt(sigma**2 + 0.25))

    x = jax.jit(lambda: objective.samples(knows, {}, jax.random.key(0), BATCH))()
    np.testing.assert_allclose(x, 0.3, atol=1e-4)
    assert len(seen) == 3


def test_rcm_is_distilled_consistency_with_distribution_matching():
    precond = Precond(targets.V(), TimeLabel(1.0))
    parts = paths.Cosine(), precond, weights.Constant(), times.LogNormal(-0.8, 1.6)
    both = ScoreRegularised(*parts, num_steps=1, scale=0.5)
    alone = ContinuousConsistency(*parts, prediction=FromTeacher())
    progress = Progress(jnp.ones(()), num_steps=1)

    def losses(objective, key):
        return objective(smooth_network, PARAMS, TEACHER, key, BATCH, progress)[0]

    @jax.jit
    def parts_and_whole(key):
        own, other = jax.random.split(key)

        def matched(scale):
            return losses(replace(both.matching, scale=scale), other)

        return losses(both, key), losses(alone, own), jax.vmap(matched)(jnp.array([0.5, 1.0]))

    assert both.matching.scale == 0.5
    whole, consistency, (matched, unscaled) = parts_and_whole(jax.random.key(0))
    np.testing.assert_allclose(whole, consistency + matched, rtol=1e-5)
    assert (unscaled > matched).all()
    traits = both.traits
    assert (traits.copies, traits.network_every, traits.distils) == (("fake_score",), 5, True)


def config_of(**changes):
    config = digits.get_config("objective=dmd2")
    config.model.update(hidden_size=16, depth=2, num_heads=2)
    config.teacher = "runs/teacher"
    for name, value in changes.items():
        config.objective[name] = value
    return config


@pytest.mark.thorough
def test_the_fake_score_is_a_copy_of_the_network_with_an_optimizer_of_its_own():
    setup = set_up(config_of(adversarial=0.003), (8, 8, 1), Classes(10))
    shapes = setup.wired.params_shape
    network = {k: x for k, x in shapes.items() if k not in setup.wired.own_names}
    assert setup.wired.own_names == ("discriminator", "fake_score")
    assert jax.tree.map(lambda x: x.shape, shapes["fake_score"]) == jax.tree.map(
        lambda x: x.shape, network
    )
    moments = setup.abstract.opt_state
    assert jax.tree.structure(moments.seldom) != jax.tree.structure(moments.always)


def test_a_discriminator_moves_its_head_and_the_generator():
    """By a network whose tokens are parts of its output."""
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    batch = {"image": images, "cond": jnp.zeros(4, jnp.int32)}

    def apply(params, x, noise_label, cond, *, key=None, hidden=False):
        out = params["w"] * x
        return (out, (out.reshape(4, 4, 2, 8),)) if hidden else out

    @once()
    def gradient(objective, params):
        def mean_loss(params):
            progress = Progress(jnp.zeros(()), num_steps=1)
            found = objective(apply, params, TEACHER, jax.random.key(2), batch, progress)
            return found[0].mean()

        return jax.grad(mean_loss)(params)

    with_one = of(adversarial=0.5, discriminator_weight=0.0)
    params = {**PARAMS, **jax.jit(with_one.init_params, static_argnums=1)(jax.random.key(0), 8)}
    found, plain = gradient(with_one, params), gradient(of(), PARAMS)
    assert float(jnp.abs(found["w"] - plain["w"])) > 1e-6
    # Its share in the generator's loss moves neither the fake score nor the head.
    np.testing.assert_allclose(found["fake_score"]["w"], plain["fake_score"]["w"], rtol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found["discriminator"]))
    trained = gradient(of(adversarial=0.5, discriminator_weight=0.01), params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(trained["discriminator"]["out"]["kernel"]))
    np.testing.assert_allclose(trained["w"], found["w"], rtol=1e-5)


def test_in_turns_each_part_has_the_updates_that_it_has_alone():
    rule = descent(9, Adam(), 1e-2, 0)
    both = in_turns(rule, 3, ("score",), rate=0.5).transform
    params: Any = {"network": jnp.ones(2), "score": jnp.ones(2)}
    alone = {name: (params[name], rule.transform.init(params[name])) for name in params}
    state = both.init(params)

    def gradient(step):
        return jnp.array([1.0 + step, -1.0])

    for step in range(5):
        g = gradient(step)
        moved, state = both.update({"network": g, "score": 2.0 * g}, state, params)
        params = optax.apply_updates(params, moved)
        for name, factor in (("network", 1.0), ("score", 2.0)):
            if name == "score" or step % 3 == 0:
                own, own_state = alone[name]
                moved, own_state = rule.transform.update(factor * g, own_state, own)
                moved = jax.tree.map(lambda x, by=0.5 if name == "score" else 1.0: by * x, moved)
                alone[name] = optax.apply_updates(own, moved), own_state
    for name in params:
        np.testing.assert_allclose(params[name], alone[name][0], rtol=1e-6)
    assert in_turns(rule, 0, ("score",)) is rule


def test_a_schedule_free_optimizer_is_refused():
    with pytest.raises(UserError, match=r"in turns, .* take optimizer=adamw"):
        in_turns(descent(9, ScheduleFreeAdamW(), 1e-2, 0), 5, ("score",))
