"""Functions of the user's that a training calls with each line of its metrics."""

import os
import signal
import time
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest

import diffjax
from diffjax.errors import UserError
from diffjax.host.interrupts import Interrupted
from diffjax.host.run_files import read_metrics
from diffjax.loop.callbacks import Callbacks, check_callbacks
from diffjax.runs.checkpoints import Checkpoints
from diffjax.spec import spec
from tests.loop.test_evaluators import PACKAGES, Known, config_of, leave_out_the_rest
from tests.support.tiny_run import arrays_of, assert_same, logged


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    leave_out_the_rest(monkeypatch)


def without(lines, *names):
    return [{k: v for k, v in line.items() if k not in names} for line in lines]


def test_each_line_reaches_a_callback_with_the_state_of_its_step(trained_run, tmp_path):
    seen = []

    def mine(step, run, numbers):
        kernel = np.asarray(run.weights("live")["final_conv"]["kernel"])
        seen.append((step, run.step, kernel.mean(), numbers))
        return {"mine/mean": kernel.mean()} if "loss" in numbers else None

    config = config_of("", {"known": spec(Known, every_steps=4)})
    diffjax.train(config, tmp_path, callbacks=(mine, lambda step, run, numbers: None))
    assert [(step, of) for step, of, *_ in seen] == [(2, 2), (4, 4), (4, 4), (6, 6)]
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "mine/mean" not in line]
    told = [{"step": step, **numbers} for step, _, _, numbers in seen]
    assert told == [line for line in lines if line["step"] < 6 or "loss" in line]
    own = [line for line in logged(tmp_path) if "mine/mean" in line]
    means = {step: mean for step, _, mean, _ in seen}
    assert {line["step"]: line["mine/mean"] for line in own} == pytest.approx(means)
    # What is trained is what it is without.
    assert_same(arrays_of(tmp_path), arrays_of(trained_run), rtol=0, atol=0)
    ours = [line for line in logged(tmp_path) if "loss" in line]
    assert ours == logged(trained_run)


@pytest.mark.parametrize("how", ["error", "stop"])
def test_a_callback_that_fails_or_is_stopped_loses_no_step(tmp_path, how):
    def fails(step, run, numbers):
        if step == 4 and how == "error":
            raise ZeroDivisionError("mine")
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30.0)

    kind, said = {
        "error": (ZeroDivisionError, "mine"),
        "stop": (Interrupted, "stopped in a callback of step 4 of 6 and saved in"),
    }[how]
    config = config_of("", {})
    with config.unlocked():
        config.evaluators = {}
    with pytest.raises(kind, match=said):
        diffjax.train(config, tmp_path, callbacks=[fails])
    with closing(Checkpoints(tmp_path / "checkpoints", 5)) as checkpoints:
        assert max(checkpoints.steps()) == 4
    assert diffjax.load(tmp_path, allowed_packages=PACKAGES).step == 4


def test_what_can_not_be_called_is_refused_at_once(tmp_path):
    for wrong, said in [
        (print, r"callbacks=print is a function: give a tuple of them, callbacks=\(print,\)"),
        (3, r"callbacks=3: it is a tuple of functions \(step, run, numbers\)"),
        ((3,), r"callbacks\[0\]=3 is not a function"),
        ((lambda step: None,), r"callbacks\[0\] is called as callback\(step, run, numbers\)"),
    ]:
        with pytest.raises(UserError, match=said):
            diffjax.train(config_of(), tmp_path / "run", callbacks=wrong)
    assert not (tmp_path / "run").exists()
    check_callbacks([max])  # Builtin functions may have no signature.


@pytest.mark.parametrize("wrong", [3, {"mine/text": "high"}, [0.5], np.float32(1)])
def test_a_callback_that_returns_no_numbers_is_named(wrong):
    def measured(step, run, numbers):
        return wrong

    written: list[int] = []
    callbacks = Callbacks([measured])
    callbacks.write(2, {"loss": 0.5})
    with pytest.raises(UserError, match=r"^measured returned .* at step 2: .* None, or numbers by"):
        callbacks.call(2, None, SimpleNamespace(write=lambda *_: written.append(1)))  # type: ignore[arg-type]
    assert written == []
