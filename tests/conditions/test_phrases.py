"""A text-like condition with masks and a pooled vector: training, the exact mean, guidance."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import choices, lookup
from diffjax.data import batches
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.loop import loop
from diffjax.loop.compiled_step import train_step_of
from diffjax.models.dit import DiT
from diffjax.runs.averages import reconstruct
from diffjax.runs.checks import check_pairs
from diffjax.runs.samples.model import Model, Request
from diffjax.runs.setup import set_up
from diffjax.sampling.guidance import OtherCondition
from diffjax.spec import TARGET, build, spec
from diffjax.training.sharding import make_mesh
from tests.runs.test_frozen_teacher import Follow
from tests.support.phrases import DEVIATION, Phrases, mean_of, phrases
from tests.support.tiny_run import loaded, of_noise, on_one_device, tiny_config

KIND = Phrases()
TEXTS = ["dark", "light light", "very light left", "left left left"]


def config_of(num_steps, **changes):
    config = tiny_config("objective=flow")
    config.unlock()
    config.data = spec(phrases)
    config.model = spec(DiT, patch_size=1, hidden_size=32, depth=1, num_heads=2)
    config.optimizer.warmup_steps, config.optimizer.learning_rate = 20, 5e-3
    config.num_steps, config.batch_size, config.ema_decays = num_steps, 128, (0.97,)
    config.weights = "ema-0.97"
    config.sampling.solver = choices.copy(choices.SOLVERS["euler"])
    config.evaluation.extractor = spec(pixel_features, size=1)
    config.evaluation.solvers, config.evaluation.num_steps = (), ()
    config.update_from_flattened_dict(changes)
    return config.lock()


@pytest.fixture(scope="module")
def model() -> Model:
    """A network that is trained on phrases for 300 steps of 128."""
    config, data = config_of(300), phrases()
    mesh = make_mesh(devices=jax.devices()[:1])
    setup = set_up(config, data.image_shape, data.condition, mesh)
    state, step = setup.init(jax.random.key(0)), jax.jit(train_step_of(setup))
    stream = batches(data.train, batch_size=config.batch_size, seed=0)
    used = setup.wired.batch_shapes(config.batch_size)
    for _ in range(config.num_steps):
        batch = next(stream)
        state, _ = step(state, jax.random.key(1), {name: batch[name] for name in used})
    return Model(setup.parts.programs, state.ema["ema-0.97"])


@pytest.fixture(scope="module")
def predict(model):
    return jax.jit(model.predict())


@pytest.mark.thorough
def test_the_exact_conditional_mean_is_recovered(predict):
    """`E[x0 | x_t, phrase] = m + a·v/(a²·v + s²)·(x_t - a·m)` of `N(m, v)`, `v = 0.15²`."""
    rng, n = np.random.default_rng(3), 200
    test = phrases().test.gather(np.arange(n))
    cond = KIND.of_batch(test)
    m, t = mean_of(cond), rng.uniform(0.3, 1.0, n).astype("f")
    a, s = 1 - t, t  # the linear path
    x_t = a * (m + DEVIATION * rng.normal(size=n)) + s * rng.normal(size=n)
    exact = m + a * DEVIATION**2 / (a**2 * DEVIATION**2 + s**2) * (x_t - a * m)
    found = predict(jnp.asarray(x_t, jnp.float32)[:, None, None, None], jnp.asarray(t), cond).x0
    error = np.sqrt(np.mean((np.ravel(found) - exact) ** 2))
    without = np.std(m)  # what is missed by a network that does not see the phrase, in pure noise
    assert without > 0.2
    assert error < 0.05


@pytest.mark.thorough
def test_the_null_condition_has_the_mean_of_all_data(predict):
    data = phrases()
    everything = np.mean(mean_of(KIND.of_batch(data.train.gather(np.arange(len(data.train))))))
    x = np.random.default_rng(0).normal(size=(200, 1, 1, 1)).astype("f")
    found = predict(x, np.ones(200, "f"), KIND.null(200)).x0
    assert abs(np.mean(found) - everything) < 0.05
    np.testing.assert_array_equal(found, predict(x, np.ones(200, "f"), None).x0)


def test_masked_states_have_no_influence_and_the_order_of_words_has_none():
    """Whatever the weights: here they are noise."""
    data, mesh = phrases(), make_mesh(devices=jax.devices()[:1])
    run = of_noise(set_up(config_of(4), data.image_shape, data.condition, mesh))
    predict = jax.jit(run.model().predict())
    cond = KIND.parse(["very dark", "light"])
    x = np.random.default_rng(0).normal(size=(2, 1, 1, 1)).astype("f")
    plain = predict(x, jnp.full(2, 0.7), cond).x0
    other = np.where(cond.mask[..., None], cond.states, 1e3).astype("f")
    np.testing.assert_array_equal(
        predict(x, jnp.full(2, 0.7), cond._replace(states=other)).x0, plain
    )
    turned = KIND.parse(["dark very", "light"])
    np.testing.assert_allclose(predict(x, jnp.full(2, 0.7), turned).x0, plain, atol=1e-5)
    light = KIND.parse(["light dark", "light"])
    assert np.abs(predict(x, jnp.full(2, 0.7), light).x0 - plain)[0].max() > 1e-3


@pytest.mark.thorough
def test_samples_have_the_mean_of_their_phrase_and_leave_a_negative_one(model):
    """Away from a phrase of another mean, the mean of guided samples moves on along the line."""
    each = 64
    cond = KIND.take(KIND.parse(TEXTS), np.repeat(np.arange(len(TEXTS)), each))
    request, mean = Request(cond, seed=2), mean_of(KIND.parse(TEXTS))
    recipe = replace(model.wired.recipe, num_steps=8, guidance_scale=1.0)
    plain = model.sample(recipe, request).reshape(len(TEXTS), each)
    np.testing.assert_allclose(plain.mean(1), mean, atol=0.08)
    assert np.all(np.abs(plain.std(1) - DEVIATION) < 0.08)
    for text in ("dark dark", "light"):
        away = replace(recipe, guidance_scale=2.0, against=OtherCondition(text))
        guided = model.sample(away, request).reshape(len(TEXTS), each).mean(1)
        negative = mean_of(KIND.parse([text]))[0]
        apart = np.abs(mean - negative) > 0.15
        further = (guided - plain.mean(1)) * np.sign(mean - negative)
        assert np.all(further[apart] > 0.03)
    null = replace(recipe, guidance_scale=2.0, against=build(lookup.against_called("null")))
    assert np.isfinite(model.sample(null, request)).all()


@pytest.mark.thorough
def test_a_run_of_phrases_trains_shows_loads_samples_and_is_evaluated(tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    loop.train(config_of(4, batch_size=16), tmp_path)
    assert list((tmp_path / "samples").glob("*.png"))
    run = loaded(tmp_path)
    assert run.parts.wired.condition == KIND
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert (found["num_samples"], found["accuracy"]) == (20, None)
    texts, against = ["very dark", "light"], "prompt:left"
    away = run.sample(texts, against=against)
    assert away.shape == (2, 1, 1, 1)
    np.testing.assert_array_equal(run.sample(KIND.parse(texts), against=against), away)
    with pytest.raises(UserError, match=r"up to 3 tokens .*: pass the condition of each sample"):
        run.sample(3)


@pytest.mark.thorough
def test_a_run_of_phrases_begins_with_another_learns_from_it_averages_and_goes_on(tmp_path):
    """Each of these reads a run, and builds its parts with the kind of condition that it has."""
    first, second = tmp_path / "first", tmp_path / "second"
    kept = {"ema_lengths": (0.1,), "snapshot_every_steps": 2, "batch_size": 16}
    loop.train(config_of(4, **kept), first)
    made = reconstruct(first, 0.15, allowed_packages=("diffjax", "tests"))
    sampled = loaded(first).sample(["dark"], weights=made.name, num_steps=2)
    assert np.isfinite(sampled).all()
    another = {"teacher": f"{first}:ema-0.97", "init_from": str(first), "batch_size": 16}
    for num_steps, extend in ((2, False), (3, "continue")):
        config = config_of(num_steps, **another).unlock()
        parts = {name: part for name, part in config.objective.items() if name != TARGET}
        config.objective = spec(Follow, **parts)
        loop.train(config.lock(), second, extend=extend)
    assert loaded(second).step == 3


def test_data_without_the_arrays_of_their_condition_are_refused():
    data = phrases()
    bare = replace(data, train=data.train.images)  # type: ignore[attr-defined]
    setup = set_up(config_of(4), data.image_shape, data.condition)
    check_pairs(setup.parts, data)
    with pytest.raises(UserError, match="have no tokens_states, tokens_mask, tokens_pooled: add"):
        check_pairs(setup.parts, bare)
