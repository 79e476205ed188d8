"""A second equal `run.sample` compiles nothing, nor does one with other numbers."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import diffjax
from diffjax.evaluation.evaluate import NamedRecipe
from diffjax.sampling.guidance import OtherWeights
from diffjax.training.measure import drawer

OLD_RUN = Path(__file__).parent / "old_runs" / "cbc9a73"


@contextmanager
def compilations():
    """The events of tracing and compiling that JAX reports meanwhile."""
    found: list[str] = []

    def listen(event: str, duration_secs: float, **how) -> None:
        del duration_secs, how
        if event.startswith("/jax/core/compile/"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def run():
    return diffjax.load(OLD_RUN)


HOW = {
    "as configured": {"guidance_scale": 2.0},
    "by name": {"solver": "ddim", "grid": "karras", "guidance": "cfg+limited"},
    "against weights": {"guidance_scale": 2.0, "against": "weights:live"},
    "against another run": {"guidance_scale": 2.0, "against": f"weights:{OLD_RUN}:live"},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_a_second_equal_call_compiles_nothing(run, how):
    how = {"num_steps": 2, **how}
    with compilations() as first:
        images = run.sample(4, **how)
    assert "/jax/core/compile/backend_compile_duration" in first
    with compilations() as again:
        np.testing.assert_array_equal(run.sample(4, **how), images)
    assert again == []


def test_other_numbers_compile_no_network(run):
    """Steps, seed, labels, scale: what is left are the few operations that make a grid."""
    run.sample(4, num_steps=2, guidance_scale=2.0)
    traced = []
    inner = run.generator(4)
    assert run.generator(4) is inner
    for how in ({"num_steps": 5}, {"seed": 3}, {"guidance_scale": 3.5}, {"grid": "log_snr"}):
        with compilations() as events:
            run.sample([3, 1, 4, 1], **{"num_steps": 2, "guidance_scale": 2.0, **how})
        traced.append(sum(event.endswith("backend_compile_duration") for event in events))
    assert traced[1] == traced[2] == 0


def test_each_recipe_of_an_evaluation_has_the_weaker_model_that_it_names(run):
    """Also where the first has none, since its guidance is off.

    One step takes the predicted x0: away from `live` by 2 it is `2·average - live`.
    """
    own = replace(run.recipe, num_steps=1, guidance_scale=1.0, against=OtherWeights("live"))
    off = NamedRecipe("", "", own, weights=run.config.weights)
    on = replace(off, recipe=replace(own, guidance_scale=2.0))
    labels = np.arange(4)
    draw = drawer(run, [off, on], None, lambda: False, lambda: None)
    found: list[Any] = [draw(each, labels)[0] for each in (off, on)]
    plain, guided = (np.concatenate(list(each.batches)) for each in found)
    how = {"num_steps": 1, "guidance_scale": 1.0}
    live = run.sample(labels, weights="live", **how)
    np.testing.assert_allclose(plain, run.sample(labels, **how), atol=1e-6)
    np.testing.assert_allclose(guided, 2 * plain - live, atol=1e-5)
    assert np.abs(plain - live).max() > 1e-4
