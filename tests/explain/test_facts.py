"""The numbers of the page: compared with closed forms, with the train step and with samples."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
import pytest

from diffjax.codecs import SpaceToDepth
from diffjax.conditions import Unconditional
from diffjax.data import digits
from diffjax.explain import dial as dials
from diffjax.explain.examples import Examples, distance, variety
from diffjax.explain.facts import Means, _latents, _means
from diffjax.explain.lesson import _keeping_the_gradient, lesson
from diffjax.explain.levels import SHOWN, at_levels, times_of_levels
from diffjax.explain.network_parts import network_parts
from diffjax.explain.way_back import FRAMES, step_recipe, way_back
from diffjax.loop.compiled_step import train_step_of
from diffjax.loop.device_batches import device_batches
from diffjax.optimizers.base import Optimizer
from diffjax.process.paths import Cosine, Linear
from diffjax.runs.samples.model import Request
from diffjax.runs.setup import Setup
from diffjax.sampling.grids import Power
from diffjax.wiring import wire
from tests.support.tiny_run import tiny_config


@pytest.mark.parametrize("path", [Linear(), Cosine()])
def test_levels_are_the_times_of_a_thousand_steps_from_hardly_any_noise_to_all_of_it(path):
    times = times_of_levels(Power(), path)
    np.testing.assert_array_equal(times[::-1], np.asarray(Power()(path, 1_000)))
    assert (times[0], times[-1]) == (0.0, np.float32(path.t_noise))
    assert (np.diff(times) > 0).all()


def test_noise_at_a_level_is_that_of_the_path_and_the_same_at_all_levels(loaded_run):
    model, images = loaded_run.model(), np.full((8, 8, 8, 1), 0.5, np.float32)
    found = at_levels(model, Power(), images, np.arange(8, dtype=np.int32), seed=3)
    t = times_of_levels(Power(), Linear())[list(SHOWN)]
    np.testing.assert_allclose(found.a, 1.0 - t, atol=1e-6)  # the path of the run is straight
    np.testing.assert_allclose(found.s, t, atol=1e-6)
    noise = np.random.default_rng(3).standard_normal(images.shape, np.float32)
    expected = found.a[:, None, None, None, None] * images + np.multiply.outer(found.s, noise)
    np.testing.assert_allclose(found.noisy, expected, atol=1e-5)
    assert found.guess.shape == found.noisy.shape


@pytest.mark.thorough(tenth=False)
def test_a_lesson_is_the_next_step_of_the_run(loaded_run):
    dataset, state = digits(), loaded_run.state
    found = lesson(loaded_run, dataset)
    assert found.step == loaded_run.step + 1
    assert found.own_noise
    # The run's own train step on the batch that comes next.
    setup = Setup.of(loaded_run.parts)
    _, key = jax.random.split(jax.random.key(loaded_run.config.seed))
    config = loaded_run.config.copy_and_resolve_references()
    with config.unlocked():
        config.num_steps += 1
    longer = replace(setup, parts=replace(setup.parts, config=config))
    batch = next(device_batches(longer, dataset, loaded_run.step))
    new, metrics = jax.jit(train_step_of(setup))(state, key, batch)
    np.testing.assert_allclose(found.loss, metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(found.losses.mean(), found.loss, rtol=1e-5)
    np.testing.assert_allclose(found.gradient_norm, metrics["grad_norm"], rtol=1e-4)
    np.testing.assert_allclose(found.learning_rate, metrics["learning_rate"])
    # The chosen weight is one of the network's, before and after that step, and in the average.
    name, *_ = found.weight.name.rpartition("/")
    leaf = found.weight.name.split("/")[-1]
    before, after, average = (
        np.ravel(tree[name][leaf]) for tree in (state.params, new.params, new.ema[found.average])
    )
    place = np.abs(before - found.weight.before).argmin()
    np.testing.assert_allclose(after[place], found.weight.after, rtol=1e-4)
    np.testing.assert_allclose(average[place], found.weight.average_after, rtol=1e-4)
    # x_t = a·x0 + s·eps, at a time in the path's domain, has noise of deviation 1.
    t = found.t[:, None, None, None]
    noise = (found.noisy - (1.0 - t) * found.clean) / t
    assert abs(noise.std() - 1.0) < 0.1
    # Velocity on the straight path: noise minus picture.
    np.testing.assert_allclose(found.answer, [[-1.0, 1.0]] * len(t))


def test_a_lesson_keeps_the_optimizer_as_it_is():
    plain = Optimizer(optax.sgd(0.5), lambda step: 0.5)
    kept = _keeping_the_gradient(plain)
    params, gradient = np.float32(1.0), np.float32(3.0)
    state: Any = kept.transform.init(params)
    assert kept.gradient_point(state, params) is params
    updates, state = kept.transform.update(gradient, state, params)
    assert updates == -1.5
    assert state[1] == 3.0


@pytest.mark.thorough(tenth=False)
def test_the_way_back_ends_in_the_samples_and_one_step_in_the_first_guess(loaded_run):
    model, condition = loaded_run.model(), np.array([3, 8], np.int32)
    found = way_back(model, loaded_run.recipe, condition, 5, seed=1)
    assert (found.steps[0], found.steps[-1], len(found.steps)) == (0, 4, FRAMES)
    recipe = step_recipe(model, loaded_run.recipe, 5)
    assert (recipe.nfe, recipe.guidance_scale) == (5, 1.0)
    traced = model.trace(recipe, Request(condition, 1))
    np.testing.assert_allclose(found.x0[-1], traced.x[-1], atol=1e-4)
    np.testing.assert_allclose(found.x, traced.x[found.steps], atol=1e-4)
    np.testing.assert_allclose(found.x0, traced.x0[found.steps], atol=1e-4)
    np.testing.assert_allclose(found.in_one, found.x0[0], atol=1e-4)
    np.testing.assert_allclose(found.t, np.asarray(traced.times)[found.steps], atol=1e-6)


def test_variety_is_zero_for_equal_pictures_and_known_for_independent_ones():
    assert variety(np.ones((3, 4, 2, 2, 1))) == 0.0
    many = np.random.default_rng(0).normal(size=(2, 3, 64, 64, 3))
    assert variety(many) == pytest.approx(np.sqrt(2.0), rel=0.02)


def test_the_dial_counts_what_a_classifier_recognises(loaded_run, monkeypatch):
    def sample(recipe, request):
        # Pictures whose brightness is their label, at scale 1 with half of them black.
        level = np.asarray(request.condition, np.float32) / 10
        level[::2] *= recipe.guidance_scale != 1.0
        return np.broadcast_to(level[:, None, None, None], (len(level), 8, 8, 1))

    class Reader:
        def by(self, n):
            return self

        def extract(self, images):
            return images, -np.abs(images[:, 0, 0] * 10 - np.arange(10))

    model = loaded_run.model()
    monkeypatch.setattr(type(model), "sample", lambda self, *given: sample(*given))
    labels = np.arange(1, 10, dtype=np.int32)
    found = dials.dial(model, loaded_run.recipe, labels, labels=labels, extractor=Reader())
    assert found.scales == tuple(sorted({*dials.SCALES, 2.0}))
    assert found.accuracy == tuple(0.5 if scale == 1.0 else 1.0 for scale in found.scales)
    assert found.pictures.shape == (len(found.scales), 9, dials.EACH, 8, 8, 1)
    # Half black and half c/10: of all pairs of ten pictures, 25 of 45 differ, by c/10.
    assert found.variety[1] == pytest.approx(25 / 45 * np.mean(labels) / 10, rel=1e-5)
    assert found.variety[-1] == 0.0


def test_the_nearest_mean_is_that_of_the_pictures_class(loaded_run):
    images = np.stack([np.full((8, 8, 1), c) for c in (-0.5, -0.3, 0.4, 0.6)]).astype(np.float32)
    examples = Examples(images, None, np.array([4, 4, 7, 7]), 4)
    in_one = np.stack([np.full((8, 8, 1), c) for c in (0.4, -0.4)]).astype(np.float32)
    found = _means(loaded_run.model(), examples, in_one, loaded_run.parts.wired.condition)
    assert isinstance(found, Means)
    assert found.titles == ["7", "4"]
    np.testing.assert_allclose(found.nearest[:, 0, 0, 0], [0.5, -0.4], atol=1e-6)
    assert found.to_mean == pytest.approx(0.05)  # 0.1 and 0
    assert found.of_examples == pytest.approx(0.1)
    assert distance(found.examples[0], images[2]) == 0.0


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("model", ["dit", "unet"])
def test_parts_have_all_weights_of_the_network(model):
    wired = wire(tiny_config(f"model={model}"), (8, 8, 1), digits().condition)
    parts = network_parts(wired)
    assert sum(part.num_params for part in parts) == wired.num_params
    if model == "dit":  # patches of 4x4 pixels
        assert {part.side for part in parts if part.places > 1} == {2.0}
        return
    sides = [part.side for part in parts if part.places > 1]
    assert (max(sides), min(sides)) == (8.0, 4.0)
    assert sides[0] == sides[-1] == 8.0


def test_latents_are_shown_where_there_are_any(loaded_run):
    model = loaded_run.model()
    assert _latents(model, np.zeros((2, 8, 8, 1), np.float32)) is None
    wired = model.wired._replace(image_shape=(4, 4, 4), condition=Unconditional())
    programs = replace(model.programs, codec=SpaceToDepth(2), wired=wired)
    latents = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 4)).astype(np.float32)
    found: Any = _latents(replace(model, programs=programs), latents)
    assert found.pictures.shape == (2, 8, 8, 1)
    assert np.sort(found.pictures.ravel()) == pytest.approx(np.sort(latents.ravel()))
