"""Guidance away from labels, negative prompts and arrays, against the formula by hand."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from diffjax import lookup
from diffjax.data import digits
from diffjax.errors import UserError
from diffjax.runs.samples.model import Request
from diffjax.runs.setup import set_up
from diffjax.sampling.guidance import Limited, NegativeCondition, OtherCondition
from diffjax.spec import build
from diffjax.training.sharding import make_mesh
from tests.support.tiny_run import of_noise, tiny_config
from tests.support.witnesses import CROSS

LABELS = np.array([3, 1, 4], np.int32)


@pytest.fixture(scope="module")
def run():
    data = digits()
    config = tiny_config("objective=flow,model=tiny", ema_decays=(0.9, 0.99))
    mesh = make_mesh(devices=jax.devices()[:1])
    run = of_noise(set_up(config, data.image_shape, data.condition, mesh))
    return replace(run, others=None)


@functools.cache
def predicting(model):
    return jax.jit(model.predict())


def one_euler_step(run, off, scale, weights=None, inside=True):
    """The end of one Euler step from noise, of velocities `off + scale·(on - off)`, by hand.

    With one step the sample is the decoded x0 at `t = 1`, which is linear in the predictions.
    """
    x = Request(LABELS).noise((8, 8, 1))
    t = np.ones(len(x), np.float32)
    on = np.asarray(predicting(run.model())(x, t, LABELS).x0)
    other = np.asarray(predicting(run.model(weights))(x, t, off).x0)
    return other + scale * (on - other) if inside else on


def sampled(run, against, **how):
    return run.sample(
        LABELS, solver="euler", num_steps=1, guidance_scale=3.0, against=against, **how
    )


@pytest.mark.parametrize(
    ("against", "off"),
    [
        ("null", [10, 10, 10]),
        ("label:7", [7, 7, 7]),
        pytest.param(["8"], [8, 8, 8], marks=CROSS),
        pytest.param(np.array([9]), [9, 9, 9], marks=CROSS),
        ([0, 1, 2], [0, 1, 2]),
        pytest.param(np.array([2, 0, 1]), [2, 0, 1], marks=CROSS),
        pytest.param(OtherCondition("5"), [5, 5, 5], marks=CROSS),
    ],
)
def test_the_second_prediction_has_the_other_condition(run, against, off):
    found = sampled(run, against)
    expected = one_euler_step(run, np.array(off, np.int32), 3.0)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - one_euler_step(run, LABELS, 3.0)).max() > 0.01


@pytest.mark.parametrize(
    ("against", "off"),
    [
        ("weights:ema-0.9", LABELS),
        ("weights:ema-0.9+null", [10, 10, 10]),
        ("weights:ema-0.9+label:7", [7, 7, 7]),
    ],
)
def test_weaker_weights_have_the_same_condition_or_one_of_their_own(run, against, off):
    found = sampled(run, against)
    expected = one_euler_step(run, np.array(off, np.int32), 3.0, "ema-0.9")
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_null_condition_of_other_weights_is_that_which_their_own_model_was_trained_with(run):
    """A model without dropout of the condition may be guided by one with it, as in EDM2."""
    wired, programs = run.parts.wired, run.parts.programs
    never = replace(programs, wired=wired._replace(condition_dropout=0.0))
    against = build(lookup.against_called("weights:small+null"))
    recipe = replace(run.recipe, num_steps=2, guidance_scale=3.0, against=against)
    model = replace(run.model(), programs=never, find=lambda name: run.model("ema-0.9"))
    found = model.sample(recipe, Request(LABELS))
    other = replace(run.model(), find=model.find).sample(recipe, Request(LABELS))
    np.testing.assert_allclose(found, other, atol=1e-5)
    model = replace(run.model(), find=lambda name: replace(run.model(), programs=never))
    with pytest.raises(UserError, match="trained with condition_dropout=0"):
        model.sample(recipe, Request(LABELS))


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize(("low", "inside"), [(-np.inf, True), (-2.0, False)])
def test_an_interval_limits_guidance_away_from_any_condition(run, low, inside):
    """In pure noise log-SNR is -inf, which is in an interval without a lower end alone."""
    found = sampled(run, [7], guidance=Limited(low=low))
    expected = one_euler_step(run, np.full(3, 7, np.int32), 3.0, inside=inside)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    "against", ["null", "label:3", "weights:ema-0.9", "weights:ema-0.9+null", "attention"]
)
def test_guidance_doubles_the_evaluations_whatever_it_leads_away_from(run, against):
    """Heun of n steps has `2·(n - 1) + 1` evaluations, each of them twice."""
    against = build(lookup.against_called(against))
    recipe = replace(run.recipe, num_steps=4, guidance_scale=2.0, against=against)
    assert recipe.nfe == 2 * 7
    assert replace(recipe, guidance_scale=1.0).nfe == 7


def test_negative_conditions_are_as_many_as_samples(run):
    request = Request(np.arange(4, dtype=np.int32), negative=np.zeros(3, np.int32))
    recipe = replace(run.recipe, guidance_scale=3.0, against=NegativeCondition())
    with pytest.raises(UserError, match="negative= has 3 rows: 4 samples need one for each"):
        run.model().sample(recipe, request)


def test_negative_conditions_stay_with_their_samples_in_every_batch(run):
    negative = np.array([0, 1, 2, 3, 4], np.int32)
    labels = np.array([5, 6, 7, 8, 9], np.int32)
    how = {"num_steps": 2, "guidance_scale": 3.0, "against": negative}
    whole = run.sample(labels, **how)
    np.testing.assert_allclose(run.sample(labels, batch_size=2, **how), whole, atol=1e-5)
    request = Request(labels, negative=negative).only(np.array([4, 1]))
    recipe = replace(run.recipe, num_steps=2, guidance_scale=3.0, against=NegativeCondition())
    np.testing.assert_allclose(run.model().sample(recipe, request), whole[[4, 1]], atol=1e-5)


@pytest.mark.parametrize(
    ("against", "said"),
    [
        ([1, 2], "against= has 2 rows: pass one for all samples, or 3, one for each"),
        ([11], "against=, a negative condition: no label is called 11"),
        ([], "against= has 0 rows"),
        (3, r"against=3: a label is written as 'label:3' or \[3\]"),
        ("label:11", "no label is called '11'"),
        ("weights:ema-0.9+label:11", "no label is called '11'"),
        ("weights:ema-0.9+null:3", "'null' takes nothing after a colon"),
        ("weights:ema-0.5+null", "guidance against weights 'ema-0.5'"),
        (NegativeCondition(), "needs one for each sample: Run.sample and Request take them"),
    ],
)
def test_what_guidance_can_not_lead_away_from(run, against, said):
    with pytest.raises(UserError, match=said):
        sampled(run, against)
