"""The loop around the step: batches made ahead, no waiting for devices, traces, the cache."""

import gzip
import json
import threading
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from diffjax.conditions import of_classes
from diffjax.data import digits
from diffjax.errors import UserError
from diffjax.host.interrupts import Interrupted
from diffjax.host.prefetch import prefetched
from diffjax.host.run_files import read_metrics
from diffjax.loop import loop
from diffjax.loop.profile import Profile, profiled
from diffjax.loop.training import Training, checkpoints_of
from diffjax.performance.loop_time import LoopTime, measure_loop_time
from diffjax.runs.setup import set_up
from experiments import train
from experiments.flags import cli
from experiments.train import parse_steps
from tests.support.tiny_run import tiny_config, without_pictures
from tests.support.trainer import Trainer


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


class Counting:
    """0, 1, 2, … and the thread that took each; the fifth is an error, if there is one."""

    def __init__(self, error: Exception | None = None):
        self.made, self.by, self.error = 0, set(), error
        self.enough = threading.Event()

    def __iter__(self):
        return self

    def __next__(self) -> int:
        self.by.add(threading.current_thread().name)
        if self.made == 4 and self.error is not None:
            raise self.error
        self.made += 1
        self.enough.set()
        return self.made - 1


def test_items_come_in_order_from_a_thread_that_ends():
    source = Counting()
    with prefetched(source) as items:
        assert [next(items) for _ in range(50)] == list(range(50))
        assert len(threads()) == 1
    assert not threads()
    assert len(source.by) == 1
    assert source.by != {threading.current_thread().name}
    assert 50 <= source.made <= 52


def test_no_more_is_made_ahead_than_was_asked_for():
    source = Counting()
    with prefetched(source, ahead=3) as items:
        next(items)
        for _ in range(100):
            if source.made == 4:
                break
            threading.Event().wait(0.02)
        threading.Event().wait(0.1)
        assert source.made == 4


def test_an_error_comes_where_its_item_would_have():
    got = []

    def take_all():
        with prefetched(Counting(UserError("picture 17 is damaged"))) as items:
            for item in items:
                got.append(item)

    with pytest.raises(UserError, match="picture 17 is damaged"):
        take_all()
    assert got == [0, 1, 2, 3]
    assert not threads()


def test_a_short_source_ends():
    with prefetched(iter("abc"), ahead=5) as letters:
        assert list(letters) == ["a", "b", "c"]


class Noted:
    """A metric on the devices: whoever reads it, waits for its step."""

    def __init__(self, step: int, read: list[int], shape: tuple[int, ...] = ()):
        self.step, self.read, self.shape = step, read, shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self.read.append(self.step)
        return np.ones(self.shape, dtype)


def looped(monkeypatch, workdir, step, should_stop) -> int:
    """The loop around a plain step, with batches 0, 1, …; returns where it stopped."""
    config = tiny_config("model=tiny", num_steps=100, log_every_steps=4)
    with config.unlocked():
        config.sample_every_steps = config.checkpoint_every_steps = 1000
    without_pictures(monkeypatch)
    monkeypatch.setattr(loop, "compile_train_step", lambda *_: step)
    monkeypatch.setattr(loop, "device_batches", lambda *_: Counting())
    setup = set_up(config, (8, 8, 1), of_classes(10))
    with closing(checkpoints_of(setup, workdir)) as checkpoints:
        training = Training(setup, digits(), workdir, checkpoints, should_stop)
        with pytest.raises(Interrupted, match=r"stopped at step \d+ of 100 and saved") as stopped:
            loop.train_and_evaluate(training)
    return int(str(stopped.value).split()[3])


def test_the_loop_reads_nothing_from_the_devices_between_its_lines(tmp_path, monkeypatch):
    """Lines at steps 4 and 8: at the second, the steps before the first are read, and no others.

    JAX's own guard of transfers sees none on a CPU, whose arrays the host reads in place.
    """
    read, batches, seen = [], [], []

    def step(state, key, batch):
        batches.append(batch)
        shapes = {"loss": (), "grad_norm": (), "learning_rate": (), "bin_loss": (10,)}
        metrics = {name: Noted(len(batches), read, shape) for name, shape in shapes.items()}
        return state, metrics | {"bin_count": Noted(len(batches), read, (10,))}

    def should_stop():
        seen.append(sorted(set(read)))
        return len(batches) == 11

    assert looped(monkeypatch, tmp_path, step, should_stop) == 11
    assert batches == list(range(11))
    # Before the first step, and after each.
    assert seen == [[]] * 9 + [[1, 2, 3, 4]] * 3
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [4, 8], "the second by the checkpoint of the stop"


def test_the_parts_of_the_loop_are_measured():
    split = measure_loop_time("tiny", tiny_config("model=tiny"), digits(), steps=2, rounds=2)
    parts = (split.compute, split.loop, split.host, split.input)
    assert all(len(part) == 2 and min(part) > 0 for part in parts)
    assert max(split.host) < min(split.compute)


def test_shares_are_medians_of_what_was_measured_side_by_side():
    split = LoopTime("a", 8, (1.0, 2.0, 4.0), (1.5, 2.2, 4.0), (0.1,) * 3, (0.5, 0.5, 0.25))
    assert split.loop_overhead == pytest.approx(0.1)
    assert split.input_speed == pytest.approx(4.0)


def test_one_trace_of_the_chosen_steps(tmp_path):
    profile = Profile(3, 4)
    with profiled(profile, tmp_path, lambda x: x + np.ones(2), 1) as step:
        step(0)
        step(1)
        assert not list((tmp_path / "profile").rglob("*.xplane.pb"))  # step 3 runs, 4 is to come
        step(2)
        step(3)
        (found,) = (tmp_path / "profile").rglob("*.trace.json.gz")
        assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    events = json.loads(gzip.decompress(found.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "train" for event in events) == 2


def test_a_trace_that_is_cut_short_is_kept(tmp_path):
    def interrupted():
        with profiled(Profile(1, 9), tmp_path, lambda: 0, 0) as step:
            step()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("text", ["a", "3:", "5:4", "0", "-1:3", "1:2:3"])
def test_steps_that_are_none(text):
    with pytest.raises(UserError, match="profile"):
        parse_steps(text)


def test_steps_beyond_the_end_are_refused(tmp_path):
    with pytest.raises(UserError, match="profile of steps 5:9: the run ends with step 8"):
        Profile(5, 9).check(8)


@pytest.mark.process
def test_a_training_leaves_a_trace_and_its_programs(tmp_path):
    # What is compiled in half a second is not kept.
    trainer = Trainer(tmp_path, xla_flags="", pictures=False)
    flags = ["--profile_steps=2:3", f"--compilation_cache={tmp_path}/cache"]
    arguments = [*trainer.arguments(tmp_path / "run"), *flags]
    ((status, said),) = trainer.start("train", [arguments])
    assert status == 0, said
    assert "trace of steps 2 to 3 in" in said
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1
    assert any("train_step" in path.name for path in (tmp_path / "cache").iterdir())


def test_a_cache_that_can_not_be(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    argv = ["--config=configs/digits.py", f"--workdir={tmp_path}/run"]
    flag = f"--compilation_cache={file}/cache"
    assert cli.run(train.main, train.FLAGS, usage="", argv=[*argv, flag]) == 2
    assert "can't write compiled programs to" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
