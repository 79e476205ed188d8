"""What a model draws is the same by every method, and is compiled once."""

from dataclasses import replace

import numpy as np
import pytest
from jax.tree_util import Partial

from diffjax.conditions import of_classes
from diffjax.errors import UserError
from diffjax.process.paths import Pair
from diffjax.runs.samples.experts import Expert, batches_of_two
from diffjax.runs.samples.model import Model, Request
from diffjax.runs.setup import set_up
from diffjax.sampling import adaptive, solvers
from diffjax.sampling.editing import keep_known
from diffjax.sampling.guidance import OtherWeights
from diffjax.sampling.sample import padded, sample
from tests.support.compilations import compilations
from tests.support.tiny_run import of_noise, one_device, tiny_config

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def run():
    return of_noise(set_up(tiny_config("model=tiny"), SHAPE, of_classes(10), one_device()))


@pytest.fixture(scope="module")
def on_eight():
    """The same on eight devices."""
    return of_noise(set_up(tiny_config("model=tiny"), SHAPE, of_classes(10)))


@pytest.fixture(scope="module")
def recipe(run):
    return replace(run.recipe, solver=solvers.ddim(), num_steps=9)


REQUEST = Request(np.array([3, 1, 4, 1, 5]), seed=2)


@pytest.mark.parametrize(
    ("devices", "window"),
    [
        ("run", 3),
        *(pytest.param("on_eight", n, marks=pytest.mark.thorough(tenth=False)) for n in (3, 8)),
    ],
)
def test_traces_and_parallel_samples_end_where_samples_do(request, recipe, devices, window):
    """Eight devices divide a window of 8, and none of 3."""
    model = request.getfixturevalue(devices).model()
    images = model.sample(recipe, REQUEST)
    scale = np.abs(images).max()
    np.testing.assert_allclose(model.trace(recipe, REQUEST).x[-1], images, atol=1e-5 * scale)
    found = model.in_parallel(recipe, REQUEST, window, 0.0)
    np.testing.assert_allclose(found.x, images, atol=1e-4 * scale)
    assert 1 < found.rounds <= 9
    with compilations() as programs:
        again = model.in_parallel(recipe, REQUEST, window, 0.0)
    assert programs == []
    np.testing.assert_array_equal(again.x, found.x)


def test_steps_are_those_of_a_trace_and_compiled_once(run, recipe):
    model, some = run.model(), REQUEST.only(np.arange(2))
    traced = model.trace(recipe, some)
    steps = list(model.steps(recipe, some))
    assert [step.number for step in steps] == list(range(10))
    np.testing.assert_array_equal([step.t for step in steps], traced.times)
    scale = np.abs(traced.x).max()
    np.testing.assert_allclose([step.x for step in steps], traced.x, atol=1e-5 * scale)
    x0 = [step.x0 for step in steps]
    np.testing.assert_allclose(x0[:-1], traced.x0, atol=1e-5 * scale)
    np.testing.assert_array_equal(x0[-1], steps[-1].x)
    others = replace(recipe, num_steps=4, guidance_scale=3.0)
    padded(others.times(model.wired.path))
    with compilations() as programs:
        assert len(list(model.steps(others, replace(some, seed=7)))) == 5
    assert programs == []


@pytest.mark.thorough(tenth=False)
def test_steps_around_what_is_known_are_those_of_the_solver_that_keeps_it(run, recipe):
    """And another image and mask, which are numbers of the program, compile nothing."""
    model, some = run.model(), REQUEST.only(np.arange(2))
    image = np.random.default_rng(0).uniform(-1, 1, (2, *SHAPE)).astype(np.float32)
    mask = np.zeros(SHAPE, np.float32)
    mask[:4] = 1.0
    kept = replace(recipe, solver=keep_known(recipe.solver, image, mask))
    (*_, end) = model.steps(recipe, some, Partial(keep_known, image=image, mask=mask))
    expected = model.walk(sample, kept, some, kept.times(model.wired.path))
    np.testing.assert_allclose(end.x, expected, atol=1e-5 * np.abs(expected).max())
    with compilations() as programs:
        list(model.steps(recipe, some, Partial(keep_known, image=-image, mask=1.0 - mask)))
    assert programs == []


@pytest.mark.thorough(tenth=False)
def test_a_walk_that_ends_in_noise_ends_so_step_by_step(run, recipe):
    model, some = run.model(), REQUEST.only(np.arange(1))
    unfinished = replace(recipe, solver=solvers.unfinished(recipe.solver), num_steps=2)
    (*_, before, end) = model.steps(unfinished, some)
    assert (before.number, end.number) == (1, 2)
    assert before.t == 0.5
    assert end.t == pytest.approx(float(model.wired.path.t_min))
    expected = model.sample_latents(unfinished, some)
    np.testing.assert_allclose(end.x, expected, atol=1e-5 * np.abs(expected).max())


def test_evaluations_are_declared_or_counted(run, recipe):
    model = run.model()
    assert model.nfe(recipe, REQUEST) == recipe.nfe == 2 * 9
    counted = replace(recipe, solver=adaptive.adaptive(1e-1), guidance_scale=1.0)
    assert counted.nfe is None
    assert model.nfe(counted, REQUEST) > 2


def test_each_batch_is_announced_before_it_is_drawn_and_may_be_the_last(run, recipe):
    begun: list[int] = []

    class Enough(Exception):
        pass

    def begin(number: int) -> None:
        begun.append(number)
        if number == 2:
            raise Enough

    request = Request(np.arange(20) % 10)
    batches = run.model().batches(recipe, request, 8, begin)
    assert begun == []
    np.testing.assert_array_equal(
        next(batches), run.model().sample(recipe, request, batch_size=8)[:8]
    )
    assert begun == [1]
    with pytest.raises(Enough):
        next(batches)


def test_a_changed_predictor_is_what_samples_are_drawn_with(on_eight, recipe):
    """One step takes x0 as it is predicted: here 0.5 wherever the guided model has anything."""
    seen = []

    def flat(guided):
        def predict(x, t, cond):
            pair = guided(x, t, cond)
            seen.append(cond.shape)
            return Pair(0 * pair.x0 + 0.5, pair.eps)

        return predict

    images = on_eight.model().through(flat).sample(replace(recipe, num_steps=1), REQUEST)
    np.testing.assert_array_equal(images, np.full((5, *SHAPE), 0.5, np.float32))
    assert set(seen) == {(8,)}, "the condition of a batch that eight devices divide"


def test_guidance_away_from_weights_needs_somebody_who_has_them(run, recipe):
    away = replace(recipe, against=OtherWeights("live"))
    alone = Model(run.parts.programs, run.weights())
    with pytest.raises(UserError, match=r"against other weights \(live\) needs a run"):
        alone.sample(away, REQUEST)
    alone.sample(replace(away, guidance_scale=1.0), REQUEST)
    weaker = run.model().weaker(away)
    assert weaker is run.model("live")
    images = replace(alone, find=lambda name: run.model(name)).sample(away, REQUEST)
    np.testing.assert_array_equal(images, run.model().sample(away, REQUEST))


def test_mapped_weights_are_the_weaker_model_s_too(run, recipe):
    """One step away from `live` by 2 is `2·average - live`, of halved weights of both."""
    away = replace(recipe, num_steps=1, against=OtherWeights("live"))
    plain = replace(away, guidance_scale=1.0)
    halved = run.model().map(lambda leaf: leaf / 2)
    live = run.model("live").map(lambda leaf: leaf / 2).sample(plain, REQUEST)
    expected = 2 * halved.sample(plain, REQUEST) - live
    np.testing.assert_allclose(
        halved.sample(away, REQUEST), expected, atol=1e-5 * np.abs(expected).max()
    )


def test_two_experts_that_are_one_model_draw_what_it_does(run, recipe):
    model, few = run.model(), replace(recipe, num_steps=3)
    one = Expert(model, few, REQUEST)
    (found,) = batches_of_two(one, one, 0.5, 8)
    images = model.sample(few, REQUEST)
    np.testing.assert_allclose(found, images, atol=1e-5 * np.abs(images).max())
    with pytest.raises(UserError, match="of 3 steps none is left to the first of two models"):
        next(batches_of_two(one, one, 1.0, 8))
