"""What keeps a run from being lost, piece by piece; test_faults.py kills whole runs."""

import contextlib
import errno
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags

from diffjax.conditions import Unconditional
from diffjax.errors import UserError
from diffjax.host import files, storage
from diffjax.host.interrupts import Interrupted, stop_signals
from diffjax.host.lock import LOCK, locked
from diffjax.loop.logging import ProgressBar
from diffjax.loop.pending_metrics import MetricsWindow, NonFiniteLoss
from diffjax.optimizers.base import Optimizer
from diffjax.runs.checkpoints import Checkpoints, hindrance
from diffjax.training.averages import Averages
from diffjax.training.nonfinite import NonFinite
from diffjax.training.state import TrainState, init_state
from diffjax.training.step import StepSettings, by_log_snr, make_train_step
from experiments.flags import cli

ROOT = Path(__file__).parents[2]

# Two at once.

HOLDER = """
import sys, time
from pathlib import Path
from diffjax.host.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.process
def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE, cwd=ROOT, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"by process {holder.pid} on \S+ since 20\S+Z?: wait"),
            locked(tmp_path),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == holder.pid, "the file stays"
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_folder_is_free_after_an_error_inside(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        pass


# Storage.


def test_a_folder_that_is_none_is_said_at_once(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"checkpoints is a file, not a folder"):
        storage.make_writable(tmp_path / "checkpoints")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission_is_said_at_once(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        storage.make_writable(tmp_path)


def save_without_room(workdir: Path, store: Checkpoints, state: TrainState) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with storage.translate_storage_errors(workdir):
            store.save(4, state, {})
            store.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_cannot_be_written_costs_no_older_checkpoint(tmp_path):
    """Files may not grow beyond a limit: the system then refuses a write as on a full disk."""
    state = init_state({"w": jnp.zeros(1)}, sgd(), Averages(()))
    good = state._replace(params={"w": jnp.asarray(noise((300_000,)))}, step=jnp.array(2))
    later = good._replace(params={"w": jnp.asarray(noise((300_000,), seed=1))}, step=jnp.array(4))
    store = Checkpoints(tmp_path / "checkpoints")
    store.save(2, good, {})
    store.wait()
    with pytest.raises(storage.StorageError, match="written any more: File too large; its ch"):
        save_without_room(tmp_path, store, later)
    store = Checkpoints(tmp_path / "checkpoints")
    assert store.steps() == [2]
    place = jnp.zeros(1).sharding
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), good)
    restored = store.restore(abstract)
    store.close()
    assert restored is not None
    np.testing.assert_array_equal(restored[0].params["w"], good.params["w"])

    def left() -> set[str]:
        return {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()}

    # Threads of the failed save may write on after it, while the folder is cleared; in a process of
    # its own they would have ended.
    deadline = time.monotonic() + 30
    while left() != {"2"} and time.monotonic() < deadline:
        time.sleep(0.2)
        Checkpoints(tmp_path / "checkpoints").close()
    assert left() == {"2"}, "the torn one is cleared away"


def test_a_file_is_whole_or_as_it_was(tmp_path):
    file = tmp_path / "a.json"
    files.write_whole(file, "before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.write_whole(file, "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.process
def test_what_the_dead_had_not_finished_is_cleared_away(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = platform.node()
    kept = {f"a.json.{here}.{os.getpid()}.tmp", f"a.json.other.{gone.pid}.tmp", "mine.tmp", "a"}
    for name in (*kept, f"a.json.{here}.{gone.pid}.tmp"):
        (tmp_path / name).write_text("")
    files.clear_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_other_errors_keep_their_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError), storage.translate_storage_errors(tmp_path):
        print(1 // 0)  # noqa: T201


# Readers that are gone.


def test_a_progress_line_that_nobody_reads_ends_no_run():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody:
        bar = ProgressBar(4, stream=nobody, interval_seconds=0.0)
        for step in range(1, 5):
            bar.write(step, {"loss": 1.0})
        bar.close()
        with contextlib.suppress(OSError):  # what the file itself still holds
            nobody.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), nobody.fileno())


def test_a_result_that_nobody_reads_is_no_error_of_the_program(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))  # noqa: SIM115

    def main(args):
        print("x" * 10, flush=True)  # noqa: T201

    assert cli.run(main, flags.FlagValues(), usage="", argv=[]) == 128 + signal.SIGPIPE

    def other(args):
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        cli.run(other, flags.FlagValues(), usage="", argv=[])


@pytest.mark.process
def test_a_terminal_without_an_accent_ends_no_program():
    code = (
        "import sys; from experiments.flags import cli; from absl import flags; sys.exit(cli.run("
    )
    code += "lambda args: print('Fr\\u00e9chet'), flags.FlagValues(), usage='', argv=[]))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "Fr\\xe9chet\n"), done.stderr


@pytest.mark.process
def test_what_makes_imports_lazy_is_imported_before_a_checkpoint_is_written(tmp_path):
    """Grain's import does so for a moment, in all threads; one that imports a function fails."""
    code = "import sys, jax, pathlib; from diffjax.runs.checkpoints import Checkpoints; "
    code += "from diffjax.training.state import TrainState; "
    code += "was = 'grain' in sys.modules; kept = Checkpoints(pathlib.Path(sys.argv[1])); "
    code += "kept.save(0, TrainState(jax.numpy.zeros(()), {}, {}, {}), {}); kept.wait(); "
    code += "print(was, 'grain' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_arrays_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    files.write_npz(path, a=np.arange(3))

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_npz(path, a=np.arange(1000))
    with np.load(path) as kept:
        assert kept["a"].tolist() == [0, 1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("said", ["Connection reset by peer", "Connection timed out"])
def test_a_lost_peer_is_no_fault_of_the_folder(said, tmp_path):
    """Errors of another process can have the words of errors of reading a file."""
    lost = jax.errors.JaxRuntimeError(f"Gloo AllReduce failed: {said}")
    with pytest.raises(jax.errors.JaxRuntimeError), storage.translate_storage_errors(tmp_path):
        raise lost
    assert hindrance(lost) == said


def test_a_lock_and_a_folder_that_can_not_be_are_one_line(tmp_path):
    (tmp_path / LOCK).mkdir()
    with (
        pytest.raises(UserError, match=r"lock.json can't be opened: Is a directory; choose"),
        locked(tmp_path),
    ):
        pass
    with pytest.raises(UserError, match="is not UTF-8: choose another folder"):
        storage.make_writable(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")))


# Signals.


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_exit_status_says_which_signal_came(number, status, capsys):
    def main(args):
        with stop_signals() as should_stop:
            assert not should_stop()
            os.kill(os.getpid(), number)
            assert should_stop()
            raise Interrupted("stopped at step 3")

    assert cli.run(main, flags.FlagValues(), usage="", argv=[]) == status
    assert capsys.readouterr().err == "stopped at step 3\n"


# Steps that are not finite.


def sgd() -> Optimizer:
    schedule = optax.linear_schedule(0.1, 0.01, 10)
    return Optimizer(
        optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(schedule)), schedule
    )


def noise(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Parabola:
    """`(w − x)²/2` with NaN for marked batches; its memory counts the losses."""

    def __call__(self, apply, params, teacher, key, batch, progress):
        loss = 0.5 * jnp.square(params["w"] - batch["image"]) + batch["bad"]
        return loss, {"log_snr": jnp.zeros_like(loss)}

    def update_memory(self, memory, seen):
        return memory + 1


def step_with(nonfinite: NonFinite):
    objective: Any = Parabola()
    network: Any = None  # this loss asks none
    settings = StepSettings(10, Unconditional(), averages=Averages((0.5,)), nonfinite=nonfinite)
    return make_train_step(network, objective, sgd(), settings)


def batch_at(step: int, bad=()) -> dict[str, jax.Array]:
    fill = np.nan if step in bad else 0.0
    return {
        "image": jnp.asarray(noise((4,), seed=step)),
        "label": jnp.zeros(4, jnp.int32),
        "bad": jnp.full(4, fill, jnp.float32),
    }


def begin(nonfinite: NonFinite) -> TrainState:
    return init_state(
        {"w": jnp.array(3.0)}, sgd(), Averages((0.5,)), jnp.array(0), nonfinite.init()
    )


def test_steps_left_out_change_nothing_else():
    """Against the recursion by hand: momentum 0.9, a rate that only counts updates made."""
    bad, nonfinite = (1, 4, 5), NonFinite(3)
    step, state = jax.jit(step_with(nonfinite)), begin(nonfinite)
    w, momentum, made, in_a_row = 3.0, 0.0, 0, 0
    for k in range(8):
        state, metrics = step(state, jax.random.key(0), batch_at(k, bad))
        rate = 0.1 + (0.01 - 0.1) * made / 10
        if k in bad:
            in_a_row += 1
        else:
            momentum = 0.9 * momentum + float(np.mean(w - noise((4,), seed=k)))
            w, made, in_a_row = w - rate * momentum, made + 1, 0
        assert float(state.params["w"]) == pytest.approx(w, rel=1e-5)
        assert float(metrics["learning_rate"]) == pytest.approx(rate, rel=1e-5)
        assert state.skipped.tolist() == [in_a_row, k + 1 - made]
        assert (int(state.step), int(state.memory)) == (k + 1, made)
        assert bool(np.isnan(metrics["loss"])) == (k in bad)
    assert np.isfinite(state.ema["ema-0.5"]["w"])


def test_what_is_off_adds_nothing_to_the_program():
    def program(nonfinite):
        arguments = begin(nonfinite), jax.random.key(0), batch_at(0)
        return str(jax.make_jaxpr(step_with(nonfinite))(*arguments))

    assert "is_finite" not in program(NonFinite())
    bins = str(jax.make_jaxpr(by_log_snr)(jnp.zeros(4), jnp.zeros(4)))
    assert program(NonFinite()).count("scan[") == bins.count("scan["), "nor are there parts"
    assert "is_finite" in program(NonFinite(1))
    assert begin(NonFinite()).skipped == ()


def test_resuming_between_steps_left_out_changes_nothing(tmp_path):
    bad, nonfinite = (3, 4, 5), NonFinite(5)
    step, state = jax.jit(step_with(nonfinite)), begin(nonfinite)
    store = Checkpoints(tmp_path / "checkpoints")
    for k in range(8):
        if k == 5:
            store.save(5, state, {})
            store.wait()
        state, _ = step(state, jax.random.key(0), batch_at(k, bad))
    place = jnp.zeros(1).sharding
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)
    restored = store.restore(abstract)
    store.close()
    assert restored is not None
    again = restored[0]
    assert again.skipped.tolist() == [2, 2]
    for k in range(5, 8):
        again, _ = step(again, jax.random.key(0), batch_at(k, bad))
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_a_negative_number_in_a_row():
    with pytest.raises(UserError, match="skip_in_a_row=-1 can't be negative"):
        NonFinite(-1)


# The window of metrics.


class Kept:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.lines: list[tuple[int, dict[str, float]]] = []

    def write(self, step, scalars):
        kept = {name: float(v) for name, v in scalars.items() if name != "images_per_second"}
        self.lines.append((step, kept))

    def close(self):
        pass


def metrics_at(step: int, **more: Any) -> dict[str, jax.Array]:
    numbers = noise((3,), seed=step)
    plain = {"loss": numbers[0], "grad_norm": numbers[1], "learning_rate": numbers[2]}
    bins = {"bin_loss": noise((10,), seed=100 + step), "bin_count": np.ones(10, np.float32)}
    return {name: jnp.asarray(value) for name, value in {**plain, **bins, **more}.items()}


def window_of(
    writer: Kept, step: int = 0, skip_in_a_row: int = 0, left_out: Kept | None = None
) -> MetricsWindow:
    return MetricsWindow(writer, 16, step, lambda: [0, 2], skip_in_a_row, left_out or Kept())


def feed(window: MetricsWindow, first: int, last: int) -> None:
    for step in range(first, last + 1):
        window.add(metrics_at(step))
        if step % 4 == 0:
            window.close()


@pytest.mark.parametrize("stop", range(1, 12))
def test_lines_do_not_depend_on_where_a_run_stopped(stop):
    whole, parts = Kept(), Kept()
    window = window_of(whole)
    feed(window, 1, 12)
    window.flush()
    assert [step for step, _ in whole.lines] == [4, 8, 12]
    for step, line in whole.lines:  # means, by NumPy
        losses = [metrics_at(k)["loss"] for k in range(step - 3, step + 1)]
        assert line["loss"] == pytest.approx(np.mean(losses), rel=1e-6)

    window = window_of(parts)
    feed(window, 1, stop)
    window.flush()
    saved = json.loads(json.dumps(window.unlogged()))
    window = window_of(parts, stop)
    window.restore(saved)
    feed(window, stop + 1, 12)
    window.flush()
    assert parts.lines == whole.lines


def test_a_loss_that_is_not_finite_is_seen_before_its_window_ends():
    window = window_of(Kept())
    window.add(metrics_at(1))
    window.flush()
    sums, counts = np.array([9.0, 0, 8, 7] + [0.0] * 6), np.array([9.0, 0, 2, 7] + [0.0] * 6)
    window.add(metrics_at(2, grad_norm=np.inf, bin_loss=sums, bin_count=counts))
    said = "gradient is not finite in step 2, whose loss is largest at log-SNR [-6, -4)"
    with pytest.raises(NonFiniteLoss, match=re.escape(said) + "; .* is step 2") as caught:
        window.flush()
    assert caught.value.cause == f"the {said}"


def test_a_loss_of_two_times_names_them():
    window = window_of(Kept())
    bad = {"loss": np.nan, "bin_loss": np.array([np.nan] + [0] * 9)}
    window.add(metrics_at(1, **bad, worst_interval=np.array([0.8125, 0.25], np.float32)))
    said = "the loss is not finite in step 1 at log-SNR [-inf, -8), between t = 0.812 and 0.25"
    with pytest.raises(NonFiniteLoss, match=re.escape(said)):
        window.flush()


def test_too_many_in_a_row_stop_the_run(caplog):
    kept, left_out = Kept(), Kept()
    window = window_of(kept, skip_in_a_row=2, left_out=left_out)
    bad = {"loss": np.nan, "bin_loss": np.array([0, np.nan] + [0] * 8)}
    for step, in_a_row, total in ((1, 0, 0), (2, 1, 1), (3, 0, 1), (4, 1, 2), (5, 2, 3)):
        more = bad if in_a_row else {}
        window.add(metrics_at(step, **more, skipped_in_a_row=in_a_row, skipped=total))
    window.close()
    window.flush()
    ((_, line),) = kept.lines
    losses = [float(metrics_at(k)["loss"]) for k in (1, 3)]
    assert line["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert line["skipped"] == 3
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == (
        "the loss is not finite in step 2 at log-SNR [-8, -6): left out, 1 in a row, 1 in all"
    )
    assert len(said) == 3
    assert [(step, line["skipped"]) for step, line in left_out.lines] == [(2, 1), (4, 2), (5, 3)]
    for _, line in left_out.lines:
        assert np.isnan(line["loss"])
        assert np.isnan(line["loss_by_log_snr/-8"])
        assert line["loss_by_log_snr/-inf"] == 0
    window.add(metrics_at(6, **bad, skipped_in_a_row=3, skipped=4))
    with pytest.raises(NonFiniteLoss, match=r"step 6 at log-SNR \[-8, -6\), 3 steps in a row"):
        window.flush()
