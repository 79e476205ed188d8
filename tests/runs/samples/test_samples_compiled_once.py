"""A second equal `run.sample` compiles nothing, nor does one with other numbers."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import diffjax
from diffjax.conditions import of_classes
from diffjax.evaluation.evaluate import NamedRecipe
from diffjax.runs.measuring.evaluated_samples import WantedSamples
from diffjax.runs.measuring.measure import drawer
from diffjax.runs.setup import set_up
from diffjax.sampling.guidance import OtherWeights
from tests.support.compilations import COMPILED, TRACED, compilations
from tests.support.old_runs import OLD_RUN
from tests.support.tiny_run import of_noise, one_device, tiny_config


@pytest.fixture(scope="module")
def run():
    setup = set_up(tiny_config("model=tiny"), (8, 8, 1), of_classes(10), one_device())
    return of_noise(setup)


BY_NAME = {"solver": "ddim", "grid": "karras", "guidance": "cfg+limited"}
ANOTHER = {"against": f"weights:{OLD_RUN}:live"}
HOW = {
    "by name against another run": {**BY_NAME, **ANOTHER},
    "as configured": {},
    "by name": BY_NAME,
    "against weights": {"against": "weights:live"},
    "against another run": ANOTHER,
}


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, marks=[] if i == 0 else pytest.mark.thorough, id=name)
        for i, (name, how) in enumerate(HOW.items())
    ],
)
def test_a_second_equal_call_compiles_nothing(how):
    run = diffjax.load(OLD_RUN, mesh=one_device())  # that has compiled nothing
    how = {"num_steps": 2, "guidance_scale": 2.0, **how}
    with compilations(TRACED) as first:
        images = run.sample(4, **how)
    assert COMPILED in first
    with compilations(TRACED) as again:
        np.testing.assert_array_equal(run.sample(4, **how), images)
    assert again == []


def test_other_numbers_compile_no_network(run):
    """Steps, seed, labels, scale: what is left are the few operations that make a grid."""
    run.sample(4, num_steps=2, guidance_scale=2.0)
    compiled = []
    assert run.model() is run.model(run.config.weights)
    for how in ({"num_steps": 5}, {"seed": 3}, {"guidance_scale": 3.5}, {"grid": "log_snr"}):
        with compilations() as programs:
            run.sample([3, 1, 4, 1], **{"num_steps": 2, "guidance_scale": 2.0, **how})
        compiled.append(len(programs))
    assert compiled[1] == compiled[2] == 0


@pytest.mark.thorough(tenth=False)
def test_each_recipe_of_an_evaluation_has_the_weaker_model_that_it_names(run, tmp_path):
    """Also where the first has none, since its guidance is off.

    One step takes the predicted x0: away from `live` by 2 it is `2·average - live`.
    """
    own = replace(run.recipe, num_steps=1, guidance_scale=1.0, against=OtherWeights("live"))
    off = NamedRecipe("", "", own, weights=run.config.weights)
    on = replace(off, recipe=replace(own, guidance_scale=2.0))
    labels = np.arange(4)
    run = replace(run, workdir=tmp_path)  # where samples may be kept
    draw = drawer(run, [off, on], WantedSamples(labels, labels, None))
    found: list[Any] = [draw(each)[0] for each in (off, on)]
    plain, guided = (np.concatenate(list(each.batches)) for each in found)
    how = {"num_steps": 1, "guidance_scale": 1.0}
    live = run.sample(labels, weights="live", **how)
    scale = np.abs(plain).max()
    np.testing.assert_allclose(plain, run.sample(labels, **how), atol=1e-6 * scale)
    np.testing.assert_allclose(guided, 2 * plain - live, atol=1e-5 * scale)
    assert np.abs(plain - live).max() > 1e-2 * scale
