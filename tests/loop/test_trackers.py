"""Trackers: what reaches them, and that none of them holds up or ends a run."""

import logging
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffjax import choices
from diffjax.errors import UserError
from diffjax.host.run_files import read_json, read_metrics
from diffjax.loop import loop, recorder
from diffjax.loop.trackers import base
from diffjax.loop.trackers.base import Tracked, Tracking, trackers_of, tracking
from diffjax.loop.trackers.wandb import Wandb
from diffjax.reports.pictures import save_png
from diffjax.spec import build, spec, spec_at
from tests.support.shared_parts import shared_parts
from tests.support.tiny_run import logged, trained_config

SEEN: list[Any] = []


@dataclass(frozen=True)
class Listed:
    """Writes all that it gets into a list, and remembers the run as "known"."""

    @contextmanager
    def __call__(self, run):
        SEEN.append(("open", run.name, run.known, run.config["name"]))
        run.remember("known")
        yield lambda step, numbers, pictures: SEEN.append((step, numbers, pictures))
        SEEN.append(("closed",))


@dataclass(frozen=True)
class Broken:
    """Fails at once, at each line, or never ends."""

    how: str = "open"

    @contextmanager
    def __call__(self, run):
        if self.how == "open":
            raise ConnectionError("no route to host")

        def track(step, numbers, pictures):
            if self.how == "hang":
                time.sleep(30.0)
            raise ConnectionError("no route to host")

        yield track


def config_of(**trackers):
    config = trained_config(checkpoint_every_steps=3)
    with config.unlocked():
        config.trackers = trackers
    return config.lock()


def without_pictures(patch):
    def drawer(parts, dataset, workdir):
        return lambda state: save_png(
            recorder.picture_of(workdir, int(state.step)), np.zeros((1, 8, 8, 1))
        )

    patch.setattr(recorder, "grid_drawer", drawer)
    patch.setattr(loop, "measure", lambda *_, **__: {"accuracy": 0.5, "recall": {"value": 1}})
    patch.setattr(loop, "page", lambda workdir: workdir / "report.html")
    shared_parts(patch)


def test_a_tracker_gets_each_line_and_picture_once_and_a_resumed_run_goes_on(
    monkeypatch, tmp_path, trained_run
):
    without_pictures(monkeypatch)
    SEEN.clear()
    workdir, config = tmp_path / "run", config_of(listed=spec(Listed), broken=spec(Broken))
    loop.train(config, workdir)
    loop.train(config, workdir)
    first = SEEN.index(("closed",)) + 1
    assert SEEN[0] == ("open", "run", "", "tiny-tiny")
    lines = [{"step": step, **numbers} for step, numbers, _ in SEEN[1 : first - 2] if numbers]
    assert lines == read_metrics(workdir / "metrics.jsonl")
    pictures = [(step, files["samples"].name) for step, _, files in SEEN[1 : first - 1] if files]
    assert pictures == [(step, f"step_{step:08d}.png") for step in (4, 6)]
    assert SEEN[first - 2][:2] == (6, {"evaluation/accuracy": 0.5, "evaluation/recall": 1.0})
    # Nothing was evaluated really, so the second call evaluates again; no line comes twice.
    assert SEEN[first] == ("open", "run", "known", "tiny-tiny")
    assert [line[0] for line in SEEN[first + 1 :]] == [6, "closed"]
    assert read_json(workdir / base.NAMES) == {"listed": "known"}
    assert logged(workdir) == logged(trained_run)


@pytest.mark.parametrize("how", ["open", "lines", "hang"])
def test_a_tracker_that_fails_or_hangs_is_one_warning(how, tmp_path, caplog):
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "diffjax"):
        one = Tracking("net", Broken(how), Tracked("run", tmp_path), seconds_to_end=0.1)
        for step in (1, 2):
            one.write(step, {"loss": np.float32(1.0)})
        one.close()
    assert time.monotonic() - began < 10.0
    said = [record.getMessage() for record in caplog.records]
    if how == "hang":
        assert said == ["tracker net did not end within 0.1 s: left behind"]
        return
    first, last = said
    assert first == ("tracker net: ConnectionError: no route to host; the training goes on without")
    assert last.startswith("tracker net lacks ")


def test_lines_beyond_those_that_wait_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "_MOST_WAITING", 2)
    go = threading.Event()

    @contextmanager
    def slow(run):
        go.wait(10.0)
        yield lambda *line: None

    one = Tracking("slow", slow, Tracked("run", tmp_path))
    for step in range(5):
        one.picture(step, tmp_path)
    assert one._lost >= 2
    go.set()


def test_what_is_no_tracker_is_refused_before_step_1(monkeypatch):
    with pytest.raises(UserError, match=r"config\.trackers\.a=3 is no tracker"):
        trackers_of(config_of(a=3))
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    for name, location in choices.TRACKERS.items():
        with pytest.raises(UserError, match=f"needs its library: pip install {name}"):
            trackers_of(config_of(one=spec_at(location)))
    with pytest.raises(UserError, match="no mode of wandb is called 'ofline'; did you mean"):
        Wandb(mode="ofline").check()


class Stub:
    """A library of which any function may be called: the calls and their arguments."""

    def __init__(self, calls, **known):
        self._calls = calls
        self.__dict__.update(known)

    def __getattr__(self, name):
        def call(*positional, **named):
            self._calls.append((name, positional, named))
            return Stub(self._calls, step=0)

        return call

    def __setitem__(self, key, value):
        self._calls.append(("set", (key, value), {}))


@pytest.mark.parametrize("known", ["", "abc"])
@pytest.mark.parametrize("name", ["wandb", "mlflow", "aim"])
def test_numbers_and_pictures_reach_the_library_and_known_steps_do_not(
    monkeypatch, tmp_path, name, known
):
    """The libraries themselves are in `tests/parity/test_trackers.py`."""
    calls: list[Any] = []
    last = 3 if known else -1
    history = [SimpleNamespace(step=last)]
    client = Stub(
        calls,
        get_metric_history=lambda *_: history,
        get_run=lambda _: SimpleNamespace(data=SimpleNamespace(metrics={"loss": 1.0})),
        get_experiment_by_name=lambda _: None,
        create_run=lambda *_, **__: SimpleNamespace(info=SimpleNamespace(run_id="new")),
    )
    run_of = Stub(calls, starting_step=last + 1, hash=known or "new")
    module = Stub(
        calls,
        MlflowClient=lambda **_: client,
        init=lambda **how: calls.append(("init", (), how)) or run_of,
        Run=lambda **how: calls.append(("init", (), how)) or run_of,
        Metric=lambda key, value, when, step: (key, value, step),
    )
    names: list[str] = []
    tracker = build(spec_at(choices.TRACKERS[name]))
    monkeypatch.setattr(f"diffjax.loop.trackers.{name}.library", lambda _: module)
    run = Tracked("run", tmp_path, {"a": {"b": 1}}, known, names.append)
    with tracker(run) as track:
        for step in (3, 4):
            track(step, {"loss": 0.5}, {})
        track(4, {}, {"samples": tmp_path / "a.png"})
    sent = [call for call in calls if call[0] in ("log", "track", "log_batch")]
    text = repr(sent)
    assert "loss" in text
    if name != "aim":  # Aim stores one value for a step.
        steps = [call[2].get("step") for call in sent if call[0] == "log"]
        steps += [m[2] for call in sent for m in call[2].get("metrics", ())]
        assert set(steps) == ({4} if known else {3, 4})
    assert "a.png" in repr(calls)
    assert {"wandb": "finish", "mlflow": "set_terminated", "aim": "close"}[name] in {
        call[0] for call in calls
    }
    assert all(each == known for each in names) if known else len(names) == 1


def test_other_processes_than_the_first_have_no_trackers(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "is_first", lambda: False)
    with tracking(config_of(broken=spec(Broken)), tmp_path) as trackers:
        assert trackers == []
