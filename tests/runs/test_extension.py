"""A run goes on in its folder with another config: longer, with another learning rate."""

import json
import shutil

import jax
import numpy as np
import pytest

from diffjax.conditions import Classes
from diffjax.errors import UserError
from diffjax.loop import loop
from diffjax.optimizers.schedules import Cosine
from diffjax.reports.run_page import write_report
from diffjax.runs.extension import planned, restarts_at
from diffjax.runs.setup import set_up
from diffjax.spec import spec
from diffjax.training.nonfinite import NonFinite
from experiments import train
from experiments.flags import cli
from tests.support.shared_parts import shared_parts
from tests.support.tiny_run import (
    arrays_of,
    assert_same,
    logged,
    on_one_device,
    trained_config,
    without_pictures,
)

COSINE = {"optimizer.schedule": spec(Cosine), "optimizer.warmup_steps": 2}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_pictures(monkeypatch)
    on_one_device(monkeypatch)
    shared_parts(monkeypatch)


def changes_of(workdir):
    return json.loads((workdir / "run.json").read_text())["changes"]


def rates(workdir):
    return {line["step"]: line["learning_rate"] for line in logged(workdir) if "loss" in line}


def cosine(n, length, warmup=2, peak=1e-3):
    """Of update n, from 0: a linear rise, then half a cosine over what is left."""
    if n < warmup:
        return peak * (n + 1) / warmup
    return peak * 0.5 * (1 + np.cos(np.pi * (n - warmup) / (length - warmup)))


def test_four_steps_made_eight_are_eight(tmp_path, caplog):
    """Bit for bit: losses, parameters, averages, moments."""
    short, long = (trained_config(num_steps=n, checkpoint_every_steps=4) for n in (4, 8))
    loop.train(short, tmp_path / "extended")
    with pytest.raises(UserError, match=r"num_steps: 4 there, 8 here\).*, or --extend this run"):
        loop.train(long, tmp_path / "extended")
    caplog.set_level("INFO", "diffjax")
    loop.train(long, tmp_path / "extended", extend=True)
    assert "num_steps: 4 -> 8" in caplog.messages
    loop.train(long, tmp_path / "straight")
    assert logged(tmp_path / "extended") == logged(tmp_path / "straight")
    assert_same(*(arrays_of(tmp_path / name) for name in ("extended", "straight")), rtol=0, atol=0)

    (entry,) = changes_of(tmp_path / "extended")
    assert entry["step"] == 4
    assert entry["changes"] == {"num_steps": [4, 8]}
    assert entry["lines"] == ["num_steps: 4 -> 8"]
    page = write_report(tmp_path / "extended").read_text()
    assert "Changed at step 4" in page
    assert "num_steps: 4 -&gt; 8" in page
    # From here on it is the run of the new config, with the flag or without.
    for extend in (False, True):
        loop.train(long, tmp_path / "extended", extend=extend)
    assert len(changes_of(tmp_path / "extended")) == 1
    with pytest.raises(UserError, match=r"num_steps: 8 there, 4 here"):
        loop.train(short, tmp_path / "extended")


@pytest.fixture(scope="module")
def annealed(tmp_path_factory):
    """Six steps down to a learning rate of 0."""
    workdir = tmp_path_factory.mktemp("annealed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        on_one_device(patch)
        shared_parts(patch)
        loop.train(trained_config(log_every_steps=1, **COSINE), workdir)
    return workdir


@pytest.fixture
def copy(annealed, tmp_path):
    return shutil.copytree(annealed, tmp_path / "run")


def longer(num_steps=12, **changes):
    return trained_config(num_steps=num_steps, log_every_steps=1, **COSINE, **changes)


def test_a_learning_rate_that_depends_on_the_length_has_to_be_decided_upon(copy):
    before = (copy / "config.json").read_text()
    with pytest.raises(UserError, match=r"depends on num_steps: --extend=continue .*=restart"):
        loop.train(longer(), copy, extend=True)
    assert (copy / "config.json").read_text() == before


@pytest.mark.thorough(tenth=False)
def test_a_schedule_continued_is_that_of_the_new_length(copy, caplog):
    caplog.set_level("INFO", "diffjax")
    loop.train(longer(), copy, extend="continue")
    expected = {n + 1: cosine(n, 6 if n < 6 else 12) for n in range(12)}
    assert rates(copy) == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert f"learning rate of step 7: 0 -> {cosine(6, 12):g}" in caplog.messages


@pytest.fixture(scope="module")
def restarted(annealed, tmp_path_factory):
    """Six steps more, with the schedule begun anew."""
    workdir = tmp_path_factory.mktemp("restarted") / "run"
    shutil.copytree(annealed, workdir)
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        on_one_device(patch)
        shared_parts(patch)
        loop.train(longer(), workdir, extend="restart")
    return workdir


def test_a_schedule_restarted_begins_anew_over_the_steps_left(restarted):
    """It alone: Adam goes on to count, so that its moments are not corrected as if new."""
    expected = {n + 1: cosine(n, 6) if n < 6 else cosine(n - 6, 6) for n in range(12)}
    assert rates(restarted) == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert changes_of(restarted)[0]["schedule_start"] == 6
    state = arrays_of(restarted)["opt_state"]
    counts = [int(leaf) for leaf in jax.tree.leaves(state) if leaf.ndim == 0]
    assert sorted(counts) == [6, 12], "the schedule's, Adam's"


@pytest.mark.parametrize("stop_after", [0, pytest.param(3, marks=pytest.mark.thorough)])
def test_a_restart_that_is_interrupted_goes_on_as_it_began(
    copy, restarted, monkeypatch, caplog, stop_after
):
    """Also if it is killed before its next checkpoint, with the same count of updates."""
    caplog.set_level("INFO", "diffjax")

    class Killed(Exception):
        pass

    def killing(*parts):
        steps = [Killed, *[compile_train_step(*parts)] * stop_after]

        def step(*arguments):
            one = steps.pop()
            if one is Killed:
                raise Killed
            return one(*arguments)

        return step

    compile_train_step = loop.compile_train_step
    with monkeypatch.context() as patch:
        patch.setattr(loop, "compile_train_step", killing)
        with pytest.raises(Killed):
            loop.train(longer(), copy, extend="restart")
    assert "learning rate of step 7: 0 -> 0.0005" in caplog.messages
    assert "schedule: starts anew at step 7" in caplog.messages
    loop.train(longer(), copy)
    assert logged(copy) == logged(restarted)
    assert_same(arrays_of(copy), arrays_of(restarted), rtol=0, atol=0)
    assert len(changes_of(copy)) == 1


@pytest.mark.parametrize(
    ("saved_at", "kept", "start", "count"),
    [
        (9, 7, 7, 5),
        *(pytest.param(n, 0, 5, 0, marks=pytest.mark.thorough(tenth=False)) for n in (5, 7)),
    ],
)
def test_a_checkpoint_of_before_a_restart_begins_its_schedule(saved_at, kept, start, count):
    """After a roll-back behind step 7 as well; of 7 and 5 steps some had been left out."""
    config = trained_config()
    with config.unlocked():
        config.nonfinite = spec(NonFinite, skip_in_a_row=9)
    setup = set_up(config, (8, 8, 1), Classes(10))
    state = setup.init(jax.random.key(0))
    skipped = np.array([0, saved_at - 5], np.int32)
    counted = jax.tree.map(lambda x: x + 5 if x.ndim == 0 else x, state.opt_state)
    state = state._replace(step=saved_at, skipped=skipped, opt_state=counted)
    meta = {"step": saved_at, **({"schedule_start": kept} if kept else {})}
    state, found = restarts_at(7, setup, state, meta)
    assert found == start
    counts = [int(x) for x in jax.tree.leaves(state.opt_state) if x.ndim == 0]
    assert sorted(counts) == [count, 5]


@pytest.mark.thorough
def test_a_second_extension_keeps_the_restart_of_the_first(copy):
    loop.train(longer(num_steps=8), copy, extend="restart")
    loop.train(longer(num_steps=12), copy, extend="continue")
    rate = rates(copy)
    assert rate[8] == pytest.approx(1e-3), "the end of its warm-up"
    assert [rate[n] for n in (9, 12)] == pytest.approx([cosine(2, 6), cosine(5, 6)], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here; a run keeps its seed"),
        ({"batch_size": 8}, "batch_size: 16 there, 8 here; a run keeps its batches"),
        ({"ema_decays": (0.99,)}, "ema_decays: .* a run keeps its averages"),
        (
            {"condition_dropout": 0.5},
            "condition_dropout: 0.1 there, 0.5 here; a run keeps what it learns",
        ),
        ({"path.t_min": 0.01}, "path.t_min: .* a run keeps what it learns"),
        ({"augment.max_shift_pixels": 1}, "augment.max_shift_pixels: .* a run keeps its data"),
        ({"init_from": "elsewhere"}, "init_from: .* a run keeps the weights that it began with"),
        ({"num_steps": 4}, "num_steps=4: it has made 6 steps"),
    ],
)
def test_what_a_run_keeps_is_refused_in_one_line(trained_run, changes, says):
    config = trained_config(**{"num_steps": 12, **changes})
    setup = set_up(config, (8, 8, 1), Classes(10))
    with pytest.raises(UserError, match=says) as refused:
        planned(trained_run, setup, True)
    assert "\n" not in str(refused.value)


def test_an_optimizer_with_other_arrays_is_refused(trained_run):
    config = trained_config(num_steps=12)
    with config.unlocked():
        config.optimizer = {"_target_": "tests.runs.test_extension:descent"}
    with pytest.raises(UserError, match=r"the state of config\.optimizer has other arrays"):
        planned(trained_run, set_up(config, (8, 8, 1), Classes(10)), True)


def descent(num_steps: int):
    import optax

    from diffjax.optimizers.base import Optimizer

    return Optimizer(optax.sgd(1e-3), lambda step: 1e-3)


def test_the_bare_error_names_the_flag_only_where_it_would_help(copy_of_run):
    with pytest.raises(UserError, match="--extend"):
        loop.train(trained_config(num_steps=12), copy_of_run)
    with pytest.raises(UserError, match=r"choose another --workdir$"):
        loop.train(trained_config(num_steps=12, seed=1), copy_of_run)


def test_another_evaluation_is_made_where_no_step_is_left(copy_of_run, monkeypatch):
    old = (copy_of_run / "evaluation.json").read_text()
    calls = []

    def evaluated(*_):
        calls.append((copy_of_run / "evaluation.json").exists())

    monkeypatch.setattr(loop, "evaluate_once", evaluated)
    config = trained_config(**{"evaluation.num_samples": 30, "sampling.num_steps": 3})
    loop.train(config, copy_of_run, extend=True)
    assert calls == [False], "there is none, so that evaluate_once makes one"
    assert (copy_of_run / "evaluation_00000006.json").read_text() == old
    assert json.loads((copy_of_run / "config.json").read_text())["sampling"]["num_steps"] == 3


@pytest.mark.parametrize("changes", ["none", ["restart"], [{"step": 1.5}]])
def test_a_record_that_somebody_changed_is_refused_in_one_line(copy_of_run, changes):
    run = json.loads((copy_of_run / "run.json").read_text())
    (copy_of_run / "run.json").write_text(json.dumps({**run, "changes": changes}))
    with pytest.raises(UserError, match="'changes' is no list of changes"):
        loop.train(trained_config(), copy_of_run)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--extend", True),
        ("--noextend", False),
        ("--extend=continue", "continue"),
        ("--extend=restart", "restart"),
    ],
)
def test_the_flag_may_have_a_value(flag, value):
    seen = []
    argv = ["--config=configs/digits.py", flag]
    assert cli.run(lambda args: seen.append(args.extend), train.FLAGS, usage="", argv=argv) == 0
    assert seen == [value]


def test_another_value_of_the_flag_is_refused(capsys):
    argv = ["--config=configs/digits.py", "--extend=longer"]
    assert cli.run(train.main, train.FLAGS, usage="", argv=argv) == 2
    assert "--extend alone, or continue or restart" in capsys.readouterr().err


def test_a_dry_run_says_what_would_change(trained_run):
    setup, data = loop.prepared(trained_config(num_steps=12))
    text = train.describe(setup, data, trained_run, extend=True)
    assert "changes: num_steps: 6 -> 12" in text
