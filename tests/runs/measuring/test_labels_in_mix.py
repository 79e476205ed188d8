"""Pairs for reflow, and samples that grids are found on, have the labels that evaluations have."""

from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from diffjax.data import ArraySource, DataSet, digits
from diffjax.errors import UserError
from diffjax.objectives.base import Traits
from diffjax.runs.measuring.evaluated_samples import labels_in_mix
from diffjax.runs.samples.model import Model
from experiments import find_grid, reflow
from experiments.flags import cli
from tests.support.old_runs import OLD_RUN


def run_on(counts, mix="data", num_classes=None):
    """A run whose data have so many images of each class."""
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    images = np.zeros((len(labels), 8, 8, 1), np.uint8)
    source = ArraySource(images, labels)
    classes = len(counts) if num_classes is None else num_classes
    data = DataSet("some", source, source, (8, 8, 1), classes, tuple("abcdefg"[: len(counts)]))
    wired = SimpleNamespace(condition=data.condition, objective=SimpleNamespace(traits=Traits()))
    config = ConfigDict({"evaluation": {"labels": mix}})
    return SimpleNamespace(
        config=config, parts=SimpleNamespace(wired=wired), dataset=lambda path: data
    )


@pytest.mark.parametrize(
    ("mix", "asked", "counts"),
    [
        ("data", None, [9, 1]),
        ("balanced", None, [5, 5]),
        ("data", "balanced", [5, 5]),
        ("balanced", "data", [9, 1]),
        ("data", "b", [0, 10]),
        ("a,b,b,b,b", None, [2, 8]),
    ],
)
def test_the_mix_is_that_of_the_config_or_of_the_flag(mix, asked, counts):
    labels = labels_in_mix(run_on([90, 10], mix), 10, asked)
    assert np.bincount(labels, minlength=2).tolist() == counts


def test_without_classes_no_data_are_read():
    run = run_on([10], num_classes=0)
    run.dataset = None
    assert labels_in_mix(run, 4).tolist() == [0, 0, 0, 0]  # type: ignore[arg-type]


def test_a_class_that_there_is_not():
    with pytest.raises(UserError, match="labels=c is neither data nor balanced"):
        labels_in_mix(run_on([90, 10]), 10, "c")


@pytest.mark.thorough
def test_reflow_draws_as_many_of_each_digit_as_there_are(tmp_path, monkeypatch):
    """Of as many pairs as training images each class has its own number of them."""
    monkeypatch.setattr(
        Model,
        "batches",
        lambda model, recipe, request, *_: [np.zeros((len(request), 8, 8, 1), np.float32)],
    )
    train = digits().train
    argv = [f"--workdir={OLD_RUN}", f"--num_pairs={len(train)}", f"--out={tmp_path / 'p.npz'}"]
    argv.append("--solver=ddim")
    assert cli.run(reflow.main, reflow.FLAGS, usage="", argv=argv) == 0
    with np.load(tmp_path / "p.npz") as pairs:
        np.testing.assert_array_equal(np.bincount(pairs["label"]), np.bincount(train.labels))  # type: ignore[attr-defined]


def test_grids_are_found_on_the_same_labels(monkeypatch):
    def prepare(model, recipe, teacher, request, **_):
        labels = request.condition
        raise UserError(f"{len(labels)}: {np.bincount(labels).tolist()}")

    monkeypatch.setattr(find_grid, "prepare", prepare)
    counts = [2 * count for count in (1, 0, 0, 3)]
    args = [f"--workdir={OLD_RUN}", "--labels=0,3,3,3", "--num_samples=4", "--solver=ddim"]
    with pytest.raises(UserError, match=rf"8: \{counts}"):
        find_grid.main(cli._parse(find_grid.FLAGS, args))
