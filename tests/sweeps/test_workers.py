"""Workers: who takes what, what they write, and what is left when they are killed."""

import json
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

import diffjax
from diffjax import config_files
from diffjax.comparison.results import STATUS
from diffjax.errors import UserError
from diffjax.host.files import write_json
from diffjax.host.run_files import read_json, read_metrics
from diffjax.spec import to_json
from diffjax.sweeps.cells import is_finished, resolved
from diffjax.sweeps.live import Live, progress_table, read_plan, rows
from diffjax.sweeps.sweep import Sweep
from diffjax.sweeps.worker import busy, listed, taken, units, work
from experiments import sweep, train
from experiments.flags import cli
from tests.support import tiny_config_file

ROOT = Path(__file__).parents[2]
CELLS = Sweep("c.py", {"objective": ("a", "b", "c", "d"), "config.seed": (0, 1)}).cells()
UNITS = units(CELLS, [[cell.name] for cell in CELLS])
HOLD = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "


def now():
    return datetime.now(UTC)


def says_done(cell, workdir):
    return (read_json(workdir / STATUS) or {}).get("state") == "done"


def status(folder, cell):
    return read_json(folder / cell.name / STATUS) or {}


def worked(folder, run, todo=UNITS, since=None, **options):
    work(todo, folder, run, since=since or now(), is_finished=says_done, **options)


def failing(*names, ran=None):
    """A runner for which these cells fail, and which records its calls."""

    def run(unit, locks, should_stop, folder):
        if ran is not None:
            ran.extend(cell.name for cell in unit)
        text = "".join(f"error: {c.name}: no\nlater\n" for c in unit if c.name in names)
        for cell in unit:
            (folder / cell.name / "output.txt").write_text(text)
        return 2 if text else 0

    return run


def on(folder, run):
    return lambda unit, locks, should_stop: run(unit, locks, should_stop, folder)


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.thorough), 6])
def test_workers_run_every_unit_once_and_never_at_once(workers, tmp_path):
    ran, at_once, rng = Counter(), Counter(), random.Random(workers)
    delays = {cell.name: rng.uniform(0, 0.05) for cell in CELLS}

    def run(unit, locks, should_stop):
        (cell,) = unit
        at_once[cell.name] += 1
        assert at_once[cell.name] == 1
        time.sleep(delays[cell.name])
        at_once[cell.name] -= 1
        ran[cell.name] += 1
        return 0

    orders = [rng.sample(UNITS, len(UNITS)) for _ in range(workers)]
    threads = [threading.Thread(target=worked, args=(tmp_path, run, order)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ran == Counter({cell.name: 1 for cell in CELLS})
    assert {status(tmp_path, cell)["attempts"] for cell in CELLS} == {1}
    assert not any(busy(tmp_path / cell.name) for cell in CELLS)


def test_a_failed_cell_is_recorded_stops_nothing_and_is_tried_once_a_command(tmp_path):
    began, ran = now(), []
    bad = CELLS[1]
    for _ in range(3):  # three workers of one command
        worked(tmp_path, on(tmp_path, failing(bad.name, ran=ran)), since=began)
    assert Counter(ran) == Counter({cell.name: 1 for cell in CELLS})
    found = status(tmp_path, bad)
    assert (found["state"], found["error"], found["attempts"]) == ("failed", "no", 1)
    assert {status(tmp_path, cell)["state"] for cell in CELLS if cell != bad} == {"done"}
    # The next command tries it again, and nothing else.
    ran.clear()
    worked(tmp_path, on(tmp_path, failing(ran=ran)), since=now())
    assert ran == [bad.name]
    found = status(tmp_path, bad)
    assert (found["state"], found["error"], found["attempts"]) == ("done", "", 2)


def test_of_a_unit_of_several_cells_only_those_fail_that_did(tmp_path):
    together = tuple(CELLS[:3])
    worked(tmp_path, on(tmp_path, failing(CELLS[1].name)), [together])
    assert [status(tmp_path, cell)["state"] for cell in together] == ["done", "failed", "done"]
    # Its finished cells are not trained again.
    ran = []
    worked(tmp_path, on(tmp_path, failing(ran=ran)), [together])
    assert ran == [CELLS[1].name]


@pytest.mark.parametrize(
    ("code", "said", "error"),
    [
        (1, "Traceback\n  File\nValueError: a bug\n\n", "ValueError: a bug"),
        (2, "error: there is no run\n", "there is no run"),
        (-9, "step 3/4\n", "ended by SIGKILL, perhaps because memory ran out"),
        (3, "", "exit status 3, without output"),
    ],
)
def test_why_a_cell_failed_is_one_line(code, said, error, tmp_path):
    def run(unit, locks, should_stop):
        (tmp_path / unit[0].name / "output.txt").write_text(said)
        return code

    worked(tmp_path, run, UNITS[:1])
    assert status(tmp_path, CELLS[0])["error"] == error


def test_a_unit_that_is_stopped_did_not_fail_and_the_rest_is_left(tmp_path):
    stop = []

    def run(unit, locks, should_stop):
        stop.append(True)
        return 143

    worked(tmp_path, run, should_stop=lambda: bool(stop))
    assert status(tmp_path, CELLS[0])["state"] == "running"
    assert not any(status(tmp_path, cell) for cell in CELLS[1:])


@pytest.mark.process
def test_what_a_dead_process_held_is_free(tmp_path):
    folder = tmp_path / CELLS[0].name
    folder.mkdir()
    for name in ("worker.lock", "lock.json"):  # a worker's, and that of a training by hand
        command = [sys.executable, "-c", HOLD + "print(flush=True); time.sleep(99)", folder / name]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
            assert holder.stdout
            holder.stdout.readline()
            assert busy(folder)
            with taken(UNITS[0], tmp_path) as locks:
                assert locks is None
            holder.kill()
        assert not busy(folder)
    with taken(UNITS[0], tmp_path) as locks:
        assert locks is not None
        with taken(UNITS[0], tmp_path) as again:
            assert again is None


@pytest.mark.process
def test_what_a_killed_worker_had_begun_another_worker_trains(tmp_path):
    """A worker that is a process; its trainings only write that they began."""

    def hang(unit, locks, should_stop):
        time.sleep(600)

    killed = multiprocessing.get_context("fork").Process(target=worked, args=(tmp_path, hang))
    killed.start()
    try:
        wait_until(lambda: status(tmp_path, CELLS[0]).get("state") == "running")
        ran = []
        worked(tmp_path, on(tmp_path, failing(ran=ran)))
        assert ran == [cell.name for cell in CELLS[1:]]
        assert busy(tmp_path / CELLS[0].name)
    finally:
        killed.kill()
        killed.join()
    worked(tmp_path, on(tmp_path, failing(ran=ran)))
    assert Counter(ran) == Counter(cell.name for cell in CELLS)
    found = [status(tmp_path, cell) for cell in CELLS]
    assert {one["state"] for one in found} == {"done"}
    assert [one["attempts"] for one in found] == [2] + [1] * (len(CELLS) - 1)


def test_a_unit_with_one_cell_taken_is_taken_and_leaves_the_others_free(tmp_path):
    with taken((CELLS[1],), tmp_path) as one:
        assert one is not None
        with taken(tuple(CELLS[:3]), tmp_path) as several:
            assert several is None
        with taken((CELLS[0],), tmp_path) as other:
            assert other is not None


@pytest.mark.process
def test_a_child_keeps_the_unit_when_its_worker_is_killed(tmp_path):
    with taken(UNITS[0], tmp_path) as locks:
        assert locks
        child = subprocess.Popen(["sleep", "99"], pass_fds=locks)
    try:
        assert busy(tmp_path / CELLS[0].name)
    finally:
        child.kill()
        child.wait()
    assert not busy(tmp_path / CELLS[0].name)


def test_a_file_system_without_locks_is_refused_in_one_line(tmp_path, monkeypatch):
    def flock(handle, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(UserError, match=r"can't be locked \(Function not implemented\).*--workdir"):
        worked(tmp_path, on(tmp_path, failing()))


def test_names_with_commas_are_listed_as_the_flag_reads_them():
    names = ["a", "channels=(32, 64)-seed=0"]
    seen = []
    argv = ["--sweep=x", f"--cells={listed(names)}"]
    assert cli.run(seen.append, sweep.FLAGS, usage="", argv=argv) == 0
    assert seen[0].cells == names


@pytest.fixture
def stopped_clock(monkeypatch):
    """The time at which the table is drawn, however long that takes."""
    at = now()

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return at

    monkeypatch.setattr("diffjax.sweeps.live.datetime", Clock)
    return at


def begun(folder, *cells, started=None):
    """A sweep's folder with a plan; `cells` are (name, state) or (name, state, step, loss)."""
    began = (started or now()).isoformat()
    plan = [{"name": name, "folder": name, "num_steps": 1000} for name, *_ in cells]
    write_json(folder / "sweep.json", {"cells": plan})
    for name, state, *rest in cells:
        (folder / name).mkdir()
        facts = {"error": "a bug" if state == "failed" else "", "seconds": 65.0}
        if state != "waiting":
            write_json(folder / name / STATUS, {"state": state, "started": began, **facts})
        if rest:
            text = json.dumps({"step": rest[0], "loss": rest[1]}) + '\n{"step": 99'
            (folder / name / "metrics.jsonl").write_text(text)
    return folder


def test_status_is_told_from_the_files_alone(tmp_path, stopped_clock, capsys):
    folder = begun(
        tmp_path,
        ("x", "done", 1000, 0.25),
        ("y", "running", 40, "nan"),
        ("z", "running", 500, 0.5),
        ("f", "failed"),
        ("w", "waiting"),
        started=stopped_clock,
    )
    (folder / "x" / "evaluation.json").write_text('{"frechet_distance": {"value": 0.584}}')
    with taken((Sweep("c", {"o": ("y", "_")}).cells()[0],), folder):
        argv = ["--status", f"--workdir={folder}"]
        assert cli.run(sweep.main, sweep.FLAGS, usage="", argv=argv) == 0
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert said == [
        ["cell", "state", "step", "loss", "Fréchet", "time"],
        ["x", "done", "1,000/1,000", "0.25", "0.584", "01:05"],
        ["y", "running", "40/1,000", "nan", "01:05"],
        ["z", "stopped", "500/1,000", "0.5", "01:05"],
        ["f", "failed", "0/1,000", "01:05", "a", "bug"],
        ["w", "waiting", "0/1,000"],
        ["1", "running,", "1", "failed,", "1", "stopped,", "1", "waiting,", "1", "done"],
    ]


def test_what_somebody_left_out_of_the_files_ends_no_table(tmp_path, capsys):
    folder = begun(tmp_path, ("a", "done"), ("b", "running"))
    plan = read_plan(folder)
    for cell in plan["cells"]:
        del cell["num_steps"], cell["folder"]
    write_json(folder / "sweep.json", plan)
    write_json(folder / "a" / "evaluation.json", {"step": 3})
    assert [row.split()[:2] for row in progress_table(rows(folder)).splitlines()[1:3]] == [
        ["a", "done"], ["b", "stopped"],
    ]  # fmt: skip
    write_json(folder / "sweep.json", {"cells": [{"num_steps": 1}]})
    with pytest.raises(UserError, match="has no list of cells with names"):
        rows(folder)


def test_a_low_terminal_shows_what_runs_first(tmp_path):
    folder = begun(tmp_path, *[(f"c{i}", "done") for i in range(9)], ("f", "failed"))
    lines = progress_table(rows(folder), height=6).splitlines()
    assert len(lines) == 6
    assert [line.split()[0] for line in lines[1:4]] == ["c0", "c1", "f"]
    assert lines[-2:] == ["… 7 more", "1 failed, 9 done"]


class Screen:
    """A terminal that understands what a table in place needs."""

    def __init__(self):
        self.lines = [""]

    def isatty(self):
        return True

    def write(self, text):
        while text.startswith("\x1b["):
            up, text = text[2:].split("F\x1b[J", 1)
            self.lines = [*self.lines[: -1 - int(up)], ""]
        first, *rest = text.split("\n")
        self.lines = [*self.lines[:-1], self.lines[-1] + first, *rest]

    def flush(self):
        pass


def test_on_a_terminal_the_table_is_drawn_in_its_place(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    folder, screen = begun(tmp_path, ("a", "waiting"), ("b", "waiting")), Screen()
    screen.write("what was there\n")
    live = Live(folder, screen)  # type: ignore[arg-type]
    for state in ("done", "failed"):
        write_json(
            folder / "a" / STATUS,
            {"state": state, "error": "no" * 99, "started": now().isoformat()},
        )
        live.draw(now=True)
    assert screen.lines[0] == "what was there"
    assert [line.split()[:2] for line in screen.lines[1:4]] == [
        ["cell", "state"], ["a", "failed"], ["b", "waiting"],
    ]  # fmt: skip
    assert screen.lines[4:] == ["1 failed, 1 waiting", ""]
    assert max(map(len, screen.lines)) < 80


def test_without_a_terminal_each_change_is_a_line(tmp_path, capsys):
    folder = begun(tmp_path, ("a", "running", 10, 0.5), ("b", "waiting"))
    live = Live(folder)
    live.draw(now=True)
    live.draw(now=True)
    write_json(folder / "a" / STATUS, {"state": "failed", "error": "no", "seconds": 3.0})
    live.draw(now=True)
    assert capsys.readouterr().err.splitlines() == [
        "a: stopped, step 10 of 1000",
        "a: failed, 00:03: no",
    ]


def test_what_a_running_cell_does_is_a_line_every_ten_seconds(tmp_path, monkeypatch, capsys):
    folder, at = begun(tmp_path, ("a", "running", 10, 0.5), ("b", "waiting")), [0]
    monkeypatch.setattr("diffjax.sweeps.live.time", SimpleNamespace(monotonic=lambda: at[0]))
    live = Live(folder)
    with taken((Sweep("c", {"o": ("a", "_")}).cells()[0],), folder):
        for second in (0, 4, 8, 12, 16):
            at[0] = second
            (folder / "a" / "output.txt").write_text(f"reading\ndrawing, {second} s so far\n\n")
            live.draw()
        assert progress_table(rows(folder)).splitlines()[1].endswith("drawing, 16 s so far")
    assert capsys.readouterr().err.splitlines() == [
        "a: running, step 10 of 1000: drawing, 0 s so far",
        "a: running, step 10 of 1000: drawing, 12 s so far",
    ]


def test_a_sweep_without_a_worker_is_not_silent(tmp_path, monkeypatch, capsys):
    folder, at = begun(tmp_path, ("a", "done"), ("b", "waiting"), ("c", "waiting")), [0]
    monkeypatch.setattr("diffjax.sweeps.live.time", SimpleNamespace(monotonic=lambda: at[0]))
    live = Live(folder)
    for second in (0, 4, 8, 12):
        at[0] = second
        live.draw()
    assert capsys.readouterr().err.splitlines() == [
        "a: done, 01:05",
        "no cell is running: 2 waiting, 1 done",
    ]


SWEEP = """
from diffjax.sweeps.sweep import Sweep

def get_sweep():
    tiny = {"config.num_steps": 60, "config.batch_size": 16, "config.log_every_steps": 1,
            "config.sample_every_steps": 60, "config.checkpoint_every_steps": 5,
            "config.sampling.num_steps": 2, "config.sampling.guidance_scale": 1.0,
            "config.evaluation.num_samples": 20, "config.evaluation.batch_size": 20,
            "config.evaluation.solvers": (), "config.evaluation.num_steps": ()}
    return Sweep("%s", {"config.seed": (0, 1)}, tiny)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "two.py"
    path.write_text(SWEEP % tiny_config_file.write(tmp_path))
    return path


def cells_of(file):
    return config_files.returned_by(str(file), "get_sweep", Sweep).cells()


def start(file, folder, *arguments):
    command = [sys.executable, "-m", "experiments.sweep", f"--sweep={file}", f"--workdir={folder}"]
    return subprocess.Popen(
        [*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def result(workdir):
    """What does not depend on when and how fast a run went."""
    records = [
        (r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(workdir / "metrics.jsonl")
    ]
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    return records, evaluation["frechet_distance"]["value"], evaluation["accuracy"]


def test_a_cell_of_another_config_is_not_finished(file, tmp_path):
    cell = cells_of(file)[0]
    workdir = tmp_path / cell.name
    workdir.mkdir()
    (workdir / "config.json").write_text(to_json(resolved(cell)))
    (workdir / "evaluation.json").write_text('{"step": 60}')
    (workdir / "report.html").write_text("")
    write_json(workdir / STATUS, {"state": "done"})
    assert not is_finished(cell, workdir)
    (workdir / "probes.json").write_text('{"step": 30}')
    assert not is_finished(cell, workdir), "the run was made longer since"
    (workdir / "probes.json").write_text('{"step": 60}')
    assert is_finished(cell, workdir)
    file.write_text(file.read_text().replace('"config.batch_size": 16', '"config.batch_size": 17'))
    assert not is_finished(cells_of(file)[0], workdir)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers=0"], "--workers=0"),
        (["--engine=kubernetes"], "<local|slurm|ray>"),
        (["--slurm=partition=gpu"], "--slurm needs --engine=slurm, not --engine=local"),
        (["--cells=seed=00"], "no sweep has begun in "),
        (["--worker", "--since=then"], "--since=then is not a time"),
        (["--status"], "no sweep has begun in "),
    ],
)
def test_mistakes_are_one_line(arguments, message, file, tmp_path, capsys):
    argv = [f"--sweep={file}", f"--workdir={tmp_path / 'none'}", *arguments]
    assert cli.run(sweep.main, sweep.FLAGS, usage="", argv=argv) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "none").exists()


def is_of(folder, pid):
    """Whether a process lives and works in a folder: numbers of dead ones may be strangers' now."""
    try:
        return str(folder) in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def kill_somebody(folder, rng, is_over):
    """Kills a worker, its training, or both, at a random moment; of which cell, if of any."""
    least = rng.choice([0, 2, 30])

    def at_work():
        return [row.name for row in rows(folder) if row.state == "running" and row.step >= least]

    while not is_over():
        names = at_work() if (folder / "sweep.json").exists() else []
        if names:
            time.sleep(rng.uniform(0, 0.5))
            cell = rng.choice(names)
            victims = [read_json(folder / cell / name) or {} for name in (STATUS, "lock.json")]
            killed = False
            for victim in rng.choice([victims[:1], victims[1:], victims]):
                if is_of(folder, victim.get("pid")):
                    os.kill(victim["pid"], signal.SIGKILL)
                    killed = True
            if killed:
                return cell
        time.sleep(0.05)
    return None


@pytest.mark.process
@pytest.mark.thorough(tenth=False)
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="knows processes by /proc")
def test_a_sweep_whose_workers_are_killed_ends_as_one_that_was_left_alone(file, tmp_path):
    """Commands, workers and trainings as a user starts them."""
    folder, rng = tmp_path / "sweep", random.Random(0)
    cells = cells_of(file)
    one = start(file, folder)
    two = start(file, folder, "--worker")  # somebody else's
    killed = kill_somebody(folder, rng, lambda: one.poll() is not None)
    said = [process.communicate(timeout=1200)[1] for process in (one, two)]
    assert killed, said
    if one.returncode == 2:  # a cell whose training alone was killed has failed
        assert "ended by SIGKILL" in said[0]
        again = start(file, folder)
        said.append(again.communicate(timeout=1200)[1])
        assert again.returncode == 0, said
    else:
        assert one.returncode == 0, said
    assert [row.state for row in rows(folder)] == ["done"] * 2
    assert (folder / "report.csv").read_text().count("\nrun,seed=") >= 2
    (cell,) = (cell for cell in cells if cell.name == killed)
    diffjax.train(resolved(cell), tmp_path / "alone")
    here, alone = result(folder / cell.name), result(tmp_path / "alone")
    assert here[::2] == alone[::2]
    # Sums of features round by the number of cores, of which a worker has its share.
    assert here[1] == pytest.approx(alone[1], rel=1e-6)
    for cell in cells:
        # Each run has the command that makes it without the sweep.
        run, seen = json.loads((folder / cell.name / "run.json").read_text()), []
        argv = shlex.split(run["command"])
        assert argv[:3] == ["python", "-m", "experiments.train"]
        assert cli.run(seen.append, train.FLAGS, usage="", argv=argv[3:]) == 0
        assert to_json(seen[0].config) == to_json(resolved(cell))
        assert seen[0].workdir == str(folder / cell.name)


@pytest.mark.process
def test_sigterm_reaches_the_training_which_saves(file, tmp_path):
    folder = tmp_path / "sweep"
    file.write_text(file.read_text().replace('"config.num_steps": 60', '"config.num_steps": 10000'))
    with start(file, folder) as process:
        metrics = folder / "seed=0" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text(), 900)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=600)
    assert process.returncode == 143
    assert said.splitlines()[-1] == "stopped with 0 of 2 cells done; run the same command to resume"
    assert not any(busy(folder / cell["folder"]) for cell in read_plan(folder)["cells"])
    output = (folder / "seed=0" / "output.txt").read_text()
    assert "and saved in" in output
    assert rows(folder)[0].state == "stopped"
    assert rows(folder)[1].state == "waiting"


def test_a_cell_that_is_none_is_named_with_the_nearest():
    with pytest.raises(
        UserError, match=r"the sweep has no cell 'a-seed=00'; did you mean 'a-seed=0'"
    ):
        sweep.named(CELLS, ["a-seed=00"])


def endless(sweep, most):
    """In the place of `plan_cells`, in the process that checks cells."""
    time.sleep(300)


@pytest.mark.process
def test_ctrl_c_ends_the_check_of_cells_at_once(monkeypatch):
    """And the process that checks, which a terminal's Ctrl-C does not reach."""
    monkeypatch.setattr(sweep, "plan_cells", endless)
    # A shell's background command ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            sweep.checked(Sweep("c.py", {"objective": ("a", "b")}), 1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 100
    assert not multiprocessing.active_children()
