"""Runs that stand still."""

import dataclasses
import logging
import re
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest

from diffjax.data import digits
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.host import watchdog
from diffjax.host.watchdog import STACKS, STATUS, Watchdog, watched
from diffjax.likelihood import bound
from diffjax.runs.measuring.measure import Wanted, measure
from diffjax.runs.samples import model
from experiments import evaluate, likelihood, reflow, sample
from experiments.flags import cli
from tests.support.tiny_run import loaded
from tests.support.trainer import CONFIG, Trainer

# A data source that really hangs: a read that never comes back, in a thread of the input pipeline.
HANGING = CONFIG.replace(
    "def get_config():",
    """
import dataclasses, time
from diffjax.data import digits as digits_data
from diffjax.data.sources import Source

@dataclasses.dataclass(frozen=True)
class Hanging(Source):
    source: object
    after: int
    def __len__(self):
        return len(self.source)
    def fingerprint(self):
        return self.source.fingerprint()
    def gather(self, rows):
        if not hasattr(Hanging, "calls"):
            Hanging.calls = 0
        Hanging.calls += 1
        while Hanging.calls > self.after:
            time.sleep(1)
        return self.source.gather(rows)

def hanging_digits(part: str, after: int):
    data = digits_data()
    return dataclasses.replace(data, **{part: Hanging(getattr(data, part), after)})

def get_config():""",
).replace(
    "    config.model = spec(Tiny)\n",
    "    config.model = spec(Tiny)\n"
    "    config.data = spec(hanging_digits, part='train', after=4)\n"
    "    config.sample_every_steps = 100\n",
)


@pytest.mark.faults
def test_a_data_source_that_hangs_ends_the_run(tmp_path):
    """One that trains, and one that evaluates, beside each other."""
    trainer = Trainer(tmp_path, HANGING)
    folders = {"train_and_evaluate": tmp_path / "trains", "evaluate_once": tmp_path / "evaluates"}
    flags = {
        "train_and_evaluate": [],
        "evaluate_once": ["--config.data.part=test", "--config.data.after=0"],
    }
    argvs = [
        [*trainer.arguments(folder), "--hang_seconds=10", "--hang_times=5", *flags[waiting]]
        for waiting, folder in folders.items()
    ]
    ended = trainer.start("train", argvs)
    for (waiting, workdir), (status, said) in zip(folders.items(), ended, strict=True):
        assert status == STATUS == 75, said
        assert "no progress for" in said
        assert "ending with status 75; the same command resumes" in said
        stacks = (workdir / STACKS).read_text()
        for text in (stacks, said):
            assert "in gather" in text, "where it hangs"
            assert f"in {waiting}" in text, "and who waits for it"
        assert (workdir / "checkpoints" / "0").is_dir()


@pytest.mark.faults
def test_programs_on_a_run_notice_a_batch_that_does_not_come(copy_of_run, monkeypatch, capfd):
    workdir, ended, still = copy_of_run, [], []

    def stands_still(*_, **__):
        still.append(True)
        while not ended:
            time.sleep(0.02)
        raise SystemExit(ended[-1])

    # No time passes before: whatever a slow machine takes to come here is no silence.
    clock = SimpleNamespace(monotonic=lambda: 1e6 if still else 0.0)
    monkeypatch.setattr(watchdog, "time", clock)
    monkeypatch.setattr(model, "sample_keys", stands_still)
    monkeypatch.setattr(bound.VariationalBound, "__call__", stands_still)
    programs = (
        (evaluate, ["--num_samples=20"]),
        (sample, ["--num_samples=20"]),
        (sample, ["--num_samples=20", "--parallel=2"]),
        (likelihood, ["--num_images=20", "--method=vlb"]),
        (reflow, ["--num_pairs=20"]),
    )
    for program, more in programs:
        ended.clear()
        still.clear()
        monkeypatch.setattr(program, "watched", partial(watched, end=ended.append))
        flags = [
            f"--workdir={workdir}",
            "--allowed_packages=tests",
            "--hang_seconds=1",
            "--hang_times=0",
            *more,
        ]
        with pytest.raises(SystemExit):
            cli.run(program.main, program.FLAGS, usage="", argv=flags)
        assert ended == [STATUS]
        said = capfd.readouterr().err
        assert re.search(r"after batch \d+: the stacks of all threads are in", said), said
    assert (workdir / STACKS).read_text().count("in stands_still") == len(programs)


@pytest.mark.faults
def test_features_of_the_real_images_are_beats(trained_run, monkeypatch, tmp_path):
    """Nothing is drawn while a reference is made, which may take an hour: each batch counts."""
    run = loaded(trained_run)
    extractor = dataclasses.replace(pixel_features(), batch_size_images=100)
    beats, drawn = [], []

    def draws(*_):
        drawn.append(len(beats))
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "sample_keys", draws)
    monkeypatch.setattr("diffjax.evaluation.cached_arrays.FOLDER", str(tmp_path))
    data = digits()
    with pytest.raises(KeyboardInterrupt):
        measure(run, data, Wanted(num_samples=20, extractors=[extractor]), begun=beats.append)
    batches = -(-len(data.train) // 104) + -(-len(data.test) // 104)  # of 8 devices
    assert drawn == [batches + 1], "and the batch that is to be drawn"
    assert beats == list(range(1, batches + 2))


def never(status: int) -> None:
    pytest.fail(f"ended with {status}")


def alarms(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


@pytest.mark.faults
def test_steps_that_come_are_no_hang(tmp_path, caplog):
    with watched(Watchdog(seconds=0.5, times=0.0), tmp_path, never) as begun:
        for step in range(10):
            begun(step)
            time.sleep(0.1)
    assert not alarms(caplog)
    assert not (tmp_path / STACKS).exists()
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.faults
def test_each_hang_is_told_once_where_it_only_tells(tmp_path, caplog):
    told = Watchdog(seconds=0.2, times=0.0, exits=False)
    with watched(told, tmp_path, never) as begun:
        for step in (3, 4):
            begun(step)
            time.sleep(0.8)
    assert len(alarms(caplog)) == 2
    assert "after step 4: the stacks of all threads are in" in alarms(caplog)[1]
    assert alarms(caplog)[0].endswith("waiting")
    assert (tmp_path / STACKS).read_text().count("after step") == 2


@pytest.mark.faults
def test_slow_steps_are_allowed_what_they_take(tmp_path, caplog):
    """Steps of 0.2 s, and one of 1 s: less than 10 times that, though more than the least."""
    with watched(Watchdog(seconds=0.3, times=10.0), tmp_path, never) as begun:
        for step in range(4):
            begun(step)
            time.sleep(0.2)
        time.sleep(1.0)
    assert not alarms(caplog)


@pytest.mark.faults
def test_a_folder_that_cannot_be_written_does_not_hold_up_the_end(tmp_path):
    ended = []
    with watched(Watchdog(seconds=0.1, times=0.0), tmp_path / "absent", ended.append):
        time.sleep(0.6)
    assert ended == [75]


def test_no_watch_is_no_thread(tmp_path):
    with watched(Watchdog(seconds=0), tmp_path) as begun:
        begun(1)
        assert "watchdog" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("change", [{"seconds": -1.0}, {"times": -1.0}, {"times": float("nan")}])
def test_numbers_that_are_none(change):
    with pytest.raises(UserError, match="must be at least 0"):
        Watchdog(**change)
