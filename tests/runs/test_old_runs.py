"""Runs of earlier versions, which have to be readable from now on.

Each folder of `tests/runs/old_runs` was left by `experiments.train` at the commit that its run.json
names (`git_revision`), with the smallest network there is; `samples.npz` holds what
`diffjax.load(…).sample` returned then. A new one is made whenever what a run leaves behind changes.
"""

import json
import logging
import shlex
import shutil
from collections.abc import Mapping
from types import MappingProxyType

import jax
import numpy as np
import pytest

import diffjax
from diffjax.errors import UserError
from diffjax.loop import loop
from diffjax.reports.run_page import write_report
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.setup import set_up
from diffjax.spec import build
from diffjax.sweeps.cells import resolved
from diffjax.sweeps.sweep import Cell
from tests.support.old_runs import OLD_RUNS
from tests.support.tiny_run import one_device, without_pictures

RUNS = sorted(path for path in OLD_RUNS.iterdir() if path.is_dir())


EACH = pytest.mark.parametrize(
    "folder",
    [RUNS[0], *(pytest.param(folder, marks=pytest.mark.thorough) for folder in RUNS[1:])],
    ids=lambda path: path.name,
)


@EACH
def test_it_is_read_and_samples_as_it_did(folder):
    run = diffjax.load(folder, mesh=one_device())
    expected = np.load(folder / "samples.npz")
    assert run.step == expected["step"]
    images = run.sample(expected["labels"], seed=int(expected["seed"]))
    # Other processors round differently.
    np.testing.assert_allclose(images, expected["images"], atol=1e-4)


@pytest.mark.thorough
@EACH
def test_the_command_that_made_it_goes_on_today(folder, tmp_path, caplog, monkeypatch):
    """With the defaults of then its config is that of today; its checkpoint has all parts."""
    without_pictures(monkeypatch)
    caplog.set_level(logging.INFO, "diffjax")
    workdir = shutil.copytree(folder, tmp_path / "run")
    command = json.loads((folder / "run.json").read_text())["command"]
    config = as_commanded(
        command.replace("digits.py", "digits.py:objective=flow"), CHANGED_DEFAULTS
    )
    assert loop.train(config, workdir) == workdir / "report.html"
    said = [record.getMessage() for record in caplog.records]
    assert "resuming at step 2 of 2" in said
    assert not (workdir / "checkpoints_damaged").exists()

    data = build(config.data)
    setup = set_up(config, data.image_shape, data.condition)
    store = Checkpoints(workdir / "checkpoints", read_only=True)
    state, start = loop.restore_or_init(setup, store, data)
    store.close()
    key = jax.random.key(config.seed)
    step = loop.compile_train_step(setup, key)
    state, metrics = step(state, key, next(loop.device_batches(setup, data, start["step"] - 1)))
    assert int(state.step) == 3
    assert np.isfinite(metrics["loss"])


# What the defaults of `configs/digits.py` were, beside its objective.
CHANGED_DEFAULTS = {
    "config.name": "digits",
    "config.optimizer.learning_rate": "0.002",
    "config.sampling.guidance_scale": "1.5",
}


def as_commanded(command: str, more: Mapping[str, str] = MappingProxyType({})):
    """The config of a command in this version, with more settings."""
    flags = [word.split("=", 1) for word in shlex.split(command) if word.startswith("--")]
    overrides = {name[2:]: text for name, text in flags if name.startswith("--config.")}
    return resolved(Cell("", {}, dict(flags)["--config"], {**overrides, **more}, arm=""))


@EACH
def test_its_page_can_be_made(folder, tmp_path):
    for name in ("config.json", "run.json", "metrics.jsonl", "evaluation.json"):
        if (folder / name).exists():
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert write_report(tmp_path).is_file()


def test_a_run_that_names_what_there_is_no_more_says_which_version_reads_it(tmp_path):
    source = RUNS[-1]
    config = json.loads((source / "config.json").read_text())
    config["model"]["width_of_old"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "run.json").write_bytes((source / "run.json").read_bytes())
    run = json.loads((source / "run.json").read_text())
    with pytest.raises(UserError, match="has no parameter 'width_of_old'") as caught:
        diffjax.load(tmp_path)
    assert f"diffjax {run['versions']['diffjax']} at {run['git_revision'][:12]}" in str(
        caught.value
    )
