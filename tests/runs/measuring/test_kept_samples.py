"""An evaluation that was stopped goes on with the samples that it has drawn."""

import json
from dataclasses import replace

import numpy as np
import pytest

from diffjax.host.interrupts import Interrupted
from diffjax.host.run_files import read_json
from diffjax.runs.measuring import kept_samples
from diffjax.runs.measuring.kept_samples import FOLDER, KeptSamples
from diffjax.runs.measuring.measure import Wanted, measure, wanted_recipes
from diffjax.runs.samples import model
from diffjax.runs.samples.model import Request


@pytest.fixture
def draws(monkeypatch):
    """How many batches were drawn, of a run whose batches are all worth keeping."""
    found = []

    def wait_for(images):
        found.append(images)
        return images

    monkeypatch.setattr(kept_samples, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(model, "wait_for", wait_for)
    return found


def without_seconds(result):
    return json.loads(json.dumps(result), object_hook=lambda d: {**d, "seconds": None})


def test_a_stopped_evaluation_goes_on_and_finds_the_same(
    trained_run, loaded_on_all, tmp_path, draws
):
    run, data, calls = replace(loaded_on_all, workdir=tmp_path), loaded_on_all.dataset(), []

    def should_stop():
        calls.append(1)
        return len(calls) == 2

    with pytest.raises(Interrupted, match="the same command goes on with the evaluation"):
        measure(run, data, should_stop=should_stop)
    assert len(draws) == len([*(tmp_path / FOLDER).iterdir()]) == 1
    assert not (tmp_path / "evaluation.json").exists()
    result = measure(run, data)
    assert len(draws) == len(result["by_nfe"]) == 2, "none is drawn twice"
    assert not (tmp_path / FOLDER).exists()
    undisturbed = read_json(trained_run / "evaluation.json")
    assert without_seconds(result) == without_seconds(undisturbed)


def test_kept_samples_belong_to_their_weights_and_rows_and_their_seconds_count(
    loaded_run, tmp_path, draws
):
    run = replace(loaded_run, workdir=tmp_path)
    named = wanted_recipes(run, Wanted())[0]
    kept, live = (KeptSamples(run, run.model(name), named) for name in (None, "live"))
    some = Request(np.arange(4) % 10)

    def drawn(value):
        return lambda: np.full((4, 8, 8, 1), value, np.float32)

    first = kept(some, drawn(1.0))
    assert kept.seconds == []
    np.testing.assert_array_equal(kept(some, lambda: pytest.fail("it is there")), first)
    assert len(kept.seconds) == 1
    assert 0 <= kept.seconds[0] < 10
    for which, other in [(live, some), (kept, replace(some, seed=1)), (kept, some.filled(5))]:
        assert which(other, drawn(2.0)).mean() == 2.0
