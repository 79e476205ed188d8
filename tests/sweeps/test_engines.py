"""Engines: copies of a command, started, waited for and stopped; real SLURM and Ray where they are.

To try them: `pip install 'diffjax[slurm,ray]'`, and for SLURM a machine that can submit jobs.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from diffjax.errors import UserError
from diffjax.sweeps.engines import (
    ENGINES,
    Job,
    SlurmTask,
    all_cores,
    local,
    on_cores,
    parse_options,
    queued,
    share,
)


def has_slurm():
    if shutil.which("sbatch") is None:
        return False
    return subprocess.run(["sinfo"], capture_output=True).returncode == 0


def for_each_engine():
    """An engine and options with which it runs here."""
    slurm = pytest.mark.skipif(not has_slurm(), reason="no SLURM here")
    marks = {"slurm": [slurm]}
    options = {"slurm": {"timeout_min": 5}, "ray": {"num_cpus": 0.1}}
    return [
        pytest.param(name, options.get(name, {}), marks=marks.get(name, []), id=name)
        for name in ENGINES
    ]


def engine_of(name):
    package = {"slurm": "submitit", "ray": "ray"}.get(name)
    if package:
        pytest.importorskip(package)
    return ENGINES[name]


# Writes a file of its own, reports the signal to stop, and ends by itself unless it is to wait.
COPY = """
import json, os, signal, sys, time
def stop(number, frame):
    open(f"{sys.argv[1]}/{os.getpid()}.stopped", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
scratch = f"{sys.argv[1]}/{os.getpid()}.tmp"
with open(scratch, "w") as file:
    json.dump({"cores": cores, "cwd": os.getcwd()}, file)
os.rename(scratch, scratch.replace(".tmp", ".json"))
print("a word", flush=True)
time.sleep(float(sys.argv[2]))
"""


def job(folder, copies, seconds, **options):
    (folder / "logs").mkdir()
    command = [sys.executable, "-c", COPY, str(folder), str(seconds)]
    return Job(command, copies, folder / "logs", options)


def started(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


@pytest.mark.process
@pytest.mark.parametrize(("name", "options"), for_each_engine())
def test_an_engine_starts_the_copies_and_waits_for_all(name, options, tmp_path):
    pulses = []
    engine_of(name)(job(tmp_path, 3, 0.5, **options), lambda: bool(pulses.append(1)))
    assert [copy["cwd"] for copy in started(tmp_path)] == [os.getcwd()] * 3
    assert pulses
    logs = [path for path in (tmp_path / "logs").iterdir() if path.suffix in (".txt", ".out")]
    assert [("a word" in log.read_text()) for log in logs] == [True] * 3
    assert not list(tmp_path.glob("*.stopped"))


@pytest.mark.process
@pytest.mark.parametrize(("name", "options"), for_each_engine())
def test_an_engine_that_is_asked_to_stop_asks_the_copies_once(name, options, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    end = time.monotonic() + 120
    all_started = []

    def pulse():
        assert signal.getsignal(signal.SIGTERM) is before
        assert time.monotonic() < end
        all_started.append(len(started(tmp_path)) == 2)
        return all_started[-1]

    engine_of(name)(job(tmp_path, 2, 300, **options), pulse)
    assert all_started[-1]
    assert len(list(tmp_path.glob("*.stopped"))) == 2


@pytest.mark.process
def test_a_copy_that_dies_does_not_end_the_wait_for_the_others(tmp_path):
    killed = []

    def pulse():
        pids = [int(path.stem) for path in tmp_path.glob("*.json")]
        if len(pids) == 2 and not killed:
            killed.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)
        return False

    began = time.monotonic()
    local(job(tmp_path, 2, 2), pulse)
    assert killed
    assert time.monotonic() - began > 2


@pytest.mark.process
@pytest.mark.skipif(not all_cores(), reason="this system binds no process to cores")
def test_local_copies_share_the_cores(tmp_path):
    copies = len(all_cores()) + 1  # so many that some share one
    local(job(tmp_path, copies, 0), lambda: False)
    assert sorted(tuple(copy["cores"]) for copy in started(tmp_path)) == sorted(
        (all_cores()[i % len(all_cores())],) for i in range(copies)
    )


@pytest.mark.skipif(not all_cores(), reason="this system binds no process to cores")
def test_the_cores_of_this_process_are_as_before():
    before = os.sched_getaffinity(0)
    with on_cores(all_cores()[:1]):
        assert os.sched_getaffinity(0) == {all_cores()[0]}
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("items", [1, 2, 7, 16])
def test_shares_are_even_and_leave_nothing_out(items):
    for count in range(1, items + 1):
        parts = [share(range(items), i, count) for i in range(count)]
        assert [item for part in parts for item in part] == list(range(items))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert share([], 0, 2) == []


@pytest.mark.parametrize("text", ["gpu", "=3", "partition=gpu,8", "a-b=1"])
def test_what_is_no_option_is_refused(text):
    if text == "partition=gpu,8":  # a value may have a comma
        assert parse_options(text) == {"partition": "gpu,8"}
        return
    with pytest.raises(UserError, match="is not an option; write name=value"):
        parse_options(text)


@pytest.mark.parametrize(
    ("engine", "package", "extra"), [("slurm", "submitit", "slurm"), ("ray", "ray", "ray")]
)
def test_a_missing_package_is_one_line_that_names_the_extra(
    engine, package, extra, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package {package}: pip install .*\[{extra}\]"):
        ENGINES[engine](job(tmp_path, 1, 0), lambda: False)


@pytest.mark.parametrize("engine", ["slurm", "ray"])
def test_an_option_that_there_is_not_is_one_line(engine, tmp_path):
    with pytest.raises(UserError, match="partitio") as caught:
        engine_of(engine)(job(tmp_path, 1, 0, partitio="gpu"), lambda: False)
    if engine == "slurm":
        assert "did you mean 'partition'?" in str(caught.value)


@pytest.mark.process
@pytest.mark.parametrize(
    ("script", "there"),
    [
        ("echo 7_0; echo 7_1", True),
        ("true", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", True),
    ],
)
def test_a_job_is_over_when_the_queue_says_so_and_not_when_it_says_nothing(
    script, there, tmp_path, monkeypatch
):
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\n{script}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert queued("7") is there


@pytest.mark.process
def test_before_its_time_is_over_a_slurm_job_saves_and_is_queued_anew(tmp_path):
    pytest.importorskip("submitit")
    task = SlurmTask([sys.executable, "-c", COPY, str(tmp_path), "300"])
    again = []

    def warn(number, frame):  # as submitit does, in a signal handler
        again.append(task.checkpoint())

    before = signal.signal(signal.SIGALRM, warn)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        assert task() == 143
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(list(tmp_path.glob("*.stopped"))) == 1
    assert again[0].function.command == task.command


@pytest.mark.process
@pytest.mark.skipif(not has_slurm(), reason="no SLURM here")
def test_what_slurm_refuses_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"SLURM refused the job: .*partition"):
        engine_of("slurm")(job(tmp_path, 2, 0, partition="nope"), lambda: False)
