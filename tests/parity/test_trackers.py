"""Runs in the real trackers, without a network; each goes on with its earlier record."""

from importlib import import_module

import numpy as np
import pytest

from diffjax.loop.trackers.aim import Aim
from diffjax.loop.trackers.base import Tracked, Tracking
from diffjax.loop.trackers.mlflow import MLflow
from diffjax.loop.trackers.wandb import Wandb
from diffjax.reports.pictures import save_png
from tests.support.later import needs

pytestmark = pytest.mark.parity
CONFIG = {"name": "run", "optimizer": {"learning_rate": 0.5}}


@pytest.fixture
def tracked(tmp_path):
    """`(tracker, steps)`: tracks as many steps, their loss 1/step, and a picture at the last."""
    known = [""]
    picture = save_png(tmp_path / "step.png", np.zeros((1, 8, 8, 1)))

    def track(tracker, *steps):
        run = Tracked("run", tmp_path, CONFIG, known[0], lambda name: known.__setitem__(0, name))
        one = Tracking("real", tracker, run, seconds_to_end=120.0)
        for step in steps:
            one.write(step, {"loss": 1 / step, "eval/samples/frechet_distance": float("nan")})
        one.picture(steps[-1], picture)
        one.close()
        assert not one._thread.is_alive()
        assert one._lost == 0
        return known[0]

    return track


@needs("mlflow")
def test_mlflow(tracked, tmp_path, monkeypatch):
    client_of = import_module("mlflow.tracking").MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracker = MLflow(f"file:{tmp_path}/mlruns", "digits")
    name = tracked(tracker, 1, 2)
    assert tracked(tracker, 2, 4) == name
    client = client_of(tracking_uri=tracker.uri)
    run = client.get_run(name)
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"name": "run", "optimizer.learning_rate": "0.5"}
    history = client.get_metric_history(name, "loss")
    assert [(each.step, each.value) for each in history] == [(1, 1.0), (2, 0.5), (4, 0.25)]
    assert [each.path for each in client.list_artifacts(name, "samples")] == ["samples/step.png"]


@needs("wandb")
def test_wandb_offline(tracked, tmp_path):
    tracker = Wandb("digits", mode="offline")
    name = tracked(tracker, 1, 2)
    assert tracked(tracker, 3) == name
    folders = sorted((tmp_path / "wandb").glob(f"offline-run-*-{name}"))
    assert folders
    files = [next(folder.glob(f"run-{name}.wandb")) for folder in folders]
    assert sum(file.stat().st_size for file in files) > 1_000
    assert any(list(folder.glob("files/media/images/samples_*.png")) for folder in folders)


@needs("aim")
def test_aim(tracked, tmp_path):
    tracker = Aim(str(tmp_path))
    name = tracked(tracker, 1, 2)
    assert tracked(tracker, 2, 4) == name
    found = import_module("aim").Run(name, repo=str(tmp_path), system_tracking_interval=None)
    (loss,) = [each for each in found.metrics() if each.name == "loss"]
    _, values = loss.values.sparse_list()  # by hashes of their steps
    assert sorted(values) == [0.25, 0.5, 1.0]
    assert found.name == "run"
    assert found["config"]["optimizer"]["learning_rate"] == 0.5
