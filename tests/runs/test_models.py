"""What a model draws is the same by every method, and is compiled once."""

from dataclasses import replace

import numpy as np
import pytest

from diffjax.conditions import of_classes
from diffjax.errors import UserError
from diffjax.process.paths import Pair
from diffjax.runs.model import Model, Request
from diffjax.runs.setup import set_up
from diffjax.sampling import adaptive, solvers
from diffjax.sampling.guidance import OtherWeights
from tests.support.compilations import compilations
from tests.support.tiny_run import of_noise, one_device, tiny_config

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def run():
    return of_noise(set_up(tiny_config("model=tiny"), SHAPE, of_classes(10)))


@pytest.fixture(scope="module")
def recipe(run):
    return replace(run.recipe, solver=solvers.ddim(), num_steps=9)


REQUEST = Request(np.array([3, 1, 4, 1, 5]), seed=2)


@pytest.mark.parametrize("window", [3, 8])  # eight devices divide the second
def test_traces_and_parallel_samples_end_where_samples_do(run, recipe, window):
    model = run.model()
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


def test_evaluations_are_declared_or_counted(recipe):
    setup = set_up(tiny_config("model=tiny"), SHAPE, of_classes(10), one_device())
    model = of_noise(setup).model()
    assert model.nfe(recipe, REQUEST) == recipe.nfe == 2 * 9
    counted = replace(recipe, solver=adaptive.adaptive(1e-1), guidance_scale=1.0)
    assert counted.nfe is None
    nfe = model.nfe(counted, REQUEST)
    assert nfe > 2
    assert model.nfe(replace(counted, solver=adaptive.adaptive(1e-4)), REQUEST) > nfe


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


def test_a_changed_predictor_is_what_samples_are_drawn_with(run, recipe):
    """One step takes x0 as it is predicted: here 0.5 wherever the guided model has anything."""
    seen = []

    def flat(guided):
        def predict(x, t, cond):
            pair = guided(x, t, cond)
            seen.append(cond.shape)
            return Pair(0 * pair.x0 + 0.5, pair.eps)

        return predict

    images = run.model().through(flat).sample(replace(recipe, num_steps=1), REQUEST)
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
