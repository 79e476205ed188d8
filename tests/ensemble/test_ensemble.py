"""Several runs as one program: each is what it would have been by itself."""

import functools
import json
import os
import shutil
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffjax import choices
from diffjax.data import digits
from diffjax.ensemble import ensemble, members
from diffjax.ensemble.ensemble import MembersFailed, train_together
from diffjax.ensemble.grouping import incompatibility
from diffjax.errors import UserError
from diffjax.host.interrupts import Interrupted
from diffjax.host.watchdog import Watchdog
from diffjax.loop import loop
from diffjax.loop.recorder import Recorder
from diffjax.process import weights
from diffjax.runs.setup import set_up
from diffjax.spec import spec
from diffjax.training import sharding
from tests.support.tiny_run import (
    arrays_of,
    assert_same,
    logged,
    on_one_device,
    tiny_config,
    without_pictures,
)

# Rates, weights, densities and seeds; two share a seed.
UNLIKE: list[dict[str, Any]] = [
    {},
    {
        "seed": 1,
        "optimizer.learning_rate": 3e-3,
        "objective.weight.gamma": 2.0,
        "path.t_noise": 0.98,
    },
    {
        "seed": 1,
        "optimizer.rule.b1": 0.8,
        "optimizer.rule.weight_decay": 0.1,
        "objective.times.mean": 0.7,
        "condition_dropout": 0.3,
    },
]
PARTS = "path=cosine,target=v,weight=min_snr,times=logit_normal"


def configs(arguments: str = PARTS, unlike=UNLIKE) -> list:
    return [tiny_config(arguments, **changes) for changes in unlike]


def setups_of(each, mesh) -> list:
    data = digits()
    return [set_up(config, data.image_shape, data.condition, mesh=mesh) for config in each]


def like_one(each, mesh) -> list:
    """As `setups_of`, for tests that need only the numbers of each member, not its parts."""
    (one,) = setups_of(each[:1], mesh)
    return [replace(one, parts=replace(one.parts, config=config)) for config in each]


def fresh(setup, like=None) -> Any:
    """Its first state, by the program of another one that differs in numbers alone."""
    return (like or setup).init(jax.random.split(jax.random.key(setup.config.seed))[0])


def all_fresh(setups) -> list[Any]:
    by_seed = {each.config.seed: each for each in setups}
    states = {seed: fresh(each, setups[0]) for seed, each in by_seed.items()}
    return [states[each.config.seed] for each in setups]


def alone(setup, like, num_steps: int = 3) -> tuple[Any, Any]:
    """The state and the last metrics of a run by itself."""
    key = jax.random.split(jax.random.key(setup.config.seed))[1]
    state, metrics = fresh(setup, like), None
    step, stream = loop.compile_train_step(setup, key), loop.device_batches(setup, digits(), 0)
    for _ in range(num_steps):
        state, metrics = step(state, key, next(stream))
    return jax.device_get((state, metrics))


def together(setups, mapped, num_steps: int = 3) -> list[tuple[Any, Any]]:
    all_of_them = members.members_of(setups)
    states, metrics = members.stack(all_of_them, all_fresh(setups)), {}
    step = members.compile_steps(all_of_them, states, mapped)
    stream = members.member_batches(all_of_them, digits(), 0)
    for _ in range(num_steps):
        states, metrics = step(states, next(stream))
    state_of = members.unstacker(all_of_them)
    return [
        jax.device_get((state_of(states, i), members.metrics_of(metrics, i)))
        for i in range(len(setups))
    ]


def assert_equal_runs(found, expected) -> None:
    for (state, metrics), (state_alone, metrics_alone) in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "bin_loss", "bin_count"):
            np.testing.assert_allclose(
                metrics[name], metrics_alone[name], rtol=1e-4, atol=1e-6, err_msg=name
            )
        # Adam divides by the root of tiny squares, so rounding shows at the scale of its step.
        assert_same(state._asdict(), state_alone._asdict(), atol=3e-4, rtol=1e-5)


@pytest.fixture(scope="module")
def unlike():
    """`network -> runs of it that differ in numbers, and what each is by itself`."""

    @functools.cache
    def runs_of(network: str) -> tuple:
        one = sharding.make_mesh(devices=jax.devices()[:1])
        numbers = UNLIKE
        if network == "unet":  # whose compilation takes long
            numbers = [{**each, "model.channel_multipliers": (1,)} for each in UNLIKE[:2]]
        setups = setups_of(configs(f"{PARTS},model={network}", numbers), one)
        expected = [alone(setup, setups[0]) for setup in setups]
        losses = [float(metrics["loss"]) for _, metrics in expected]
        assert len({f"{loss:.4f}" for loss in losses}) == len(setups), "the numbers must matter"
        return setups, expected

    return runs_of


def test_a_member_is_what_it_would_be_alone():
    """The second of two side by side, in whose program are the numbers of the first."""
    one = sharding.make_mesh(devices=jax.devices()[:1])
    numbers = [{}, {**UNLIKE[1], **UNLIKE[2]}]
    setups = setups_of(configs(f"{PARTS},model=tiny", numbers), one)
    (_, other), (_, metrics) = found = together(setups, jax.vmap)
    assert abs(metrics["loss"] - other["loss"]) > 1e-3, "the numbers must matter"
    assert_equal_runs(found[1:], [alone(setups[1], setups[0])])


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("network", "mapped"),
    [("dit", members.one_by_one), ("unet", jax.vmap)],
    ids=["dit in turn", "unet"],
)
def test_members_of_larger_networks_are_what_they_would_be_alone(unlike, network, mapped):
    setups, expected = unlike(network)
    assert_equal_runs(together(setups, mapped), expected)


def assert_eight_devices_train_what_one_does(count, shared):
    rates = [{"optimizer.learning_rate": 1e-3 * (1 + i)} for i in range(count)]
    seeds = [{"seed": 0 if shared else i} for i in range(count)]
    each = configs("model=tiny", [rate | seed for rate, seed in zip(rates, seeds, strict=True)])
    one = sharding.make_mesh(devices=jax.devices()[:1])
    expected = together(like_one(each, one), jax.vmap)
    assert_equal_runs(together(like_one(each, sharding.make_mesh()), jax.vmap), expected)


@pytest.mark.thorough
def test_four_members_of_one_seed_on_eight_devices():
    assert_eight_devices_train_what_one_does(4, shared=True)


@pytest.mark.thorough
@pytest.mark.parametrize("count", [3, 8])
def test_eight_devices_train_what_one_does(count):
    """Three split their batches over all devices, eight have one each."""
    assert_eight_devices_train_what_one_does(count, shared=False)


def test_three_members_split_batches_four_share_devices_in_twos_and_eight_have_one_each():
    (setup,) = setups_of(configs("model=tiny", [{}]), sharding.make_mesh())
    for count, side_by_side in ((3, 1), (4, 4), (8, 8)):
        shape = members.members_of([setup] * count).mesh.shape
        assert dict(shape) == {"member": side_by_side, "data": 8 // side_by_side}


def test_members_stand_on_devices_of_their_own():
    setups = like_one(configs("model=tiny", [{"seed": i} for i in range(8)]), sharding.make_mesh())
    all_of_them = members.members_of(setups)
    state: Any = {"w": np.arange(3.0)}
    (stacked,) = jax.tree.leaves(members.stack(all_of_them, [state] * 8))
    assert {shard.data.shape for shard in stacked.addressable_shards} == {(1, 3)}
    batch = next(members.member_batches(all_of_them, digits(), 0))
    assert batch["image"].addressable_shards[0].data.shape == (1, 16, 8, 8, 1)


def test_members_of_one_seed_share_their_batch():
    setups = setups_of(configs(TINY, [{}, {"condition_dropout": 0.5}]), sharding.make_mesh())
    batch = next(members.member_batches(members.members_of(setups), digits(), 0))
    assert batch["image"].shape == (1, 16, 8, 8, 1)
    # Of three, two of which share a seed, there are two batches; each is that of the run alone.
    setups = like_one(configs(TINY, [{"seed": 3}, {"seed": 1}, {"seed": 1}]), setups[0].mesh)
    all_of_them = members.members_of(setups)
    batch = next(members.member_batches(all_of_them, digits(), 0))
    assert members._which(all_of_them).tolist() == [0, 1, 1]
    for found, setup in zip(batch["image"], setups, strict=False):
        alone = next(loop.device_batches(setup, digits(), 0))["image"]
        np.testing.assert_array_equal(found, alone)


TINY = "model=tiny"
RUNS = [{}, {"seed": 1, "optimizer.learning_rate": 3e-3}]


@pytest.fixture(scope="module")
def ensemble_run(tmp_path_factory):
    """Two members that nothing disturbed, without pictures."""
    folders = [tmp_path_factory.mktemp("ensemble") / name for name in "ab"]
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        on_one_device(patch)
        pages = train_together(configs(TINY, RUNS), folders, ["command a", "command b"])
    assert pages == [folder / "report.html" for folder in folders]
    return folders


def assert_like(here, there) -> None:
    """What two runs of other programs leave; rounding shows at the scale of Adam's step."""
    assert_same(arrays_of(here), arrays_of(there), atol=3e-4, rtol=1e-5)
    for one, other in zip(logged(here), logged(there), strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-4, atol=1e-6)


def test_a_member_has_the_folder_of_a_run(trained_run, ensemble_run):
    """The first is the run of all tests, but for its pictures, evaluation and page."""
    here, there = (
        {str(p.relative_to(at)) for p in at.rglob("*") if "tensorboard" not in str(p)}
        for at in (ensemble_run[0], trained_run)
    )
    left_out = ("samples/", "evaluation", "report.html")
    assert {p for p in here ^ there if "/d/" not in p and not p.startswith(left_out)} == set()
    assert_like(ensemble_run[0], trained_run)
    runs = [json.loads((folder / "run.json").read_text()) for folder in ensemble_run]
    assert [run["command"] for run in runs] == ["command a", "command b"]
    assert [run["ensemble"]["members"] for run in runs] == [2, 2]
    assert [run["ensemble"]["index"] for run in runs] == [0, 1]


@pytest.mark.thorough
def test_each_member_is_the_run_alone(ensemble_run, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    loop.train(configs(TINY, RUNS)[1], tmp_path / "b")
    assert_like(ensemble_run[1], tmp_path / "b")


@pytest.mark.thorough
def test_a_finished_member_is_left_alone(ensemble_run, tmp_path, monkeypatch):
    """By `train` as well: its checkpoints are those of a run."""
    without_pictures(monkeypatch)
    copy = shutil.copytree(ensemble_run[0], tmp_path / "a")
    loop.train(configs(TINY, RUNS)[0], copy)
    assert_same(arrays_of(copy), arrays_of(ensemble_run[0]), rtol=0, atol=0)


def interrupting(monkeypatch, module, name, after: int) -> None:
    """Ctrl-C comes while a step is under way."""
    original, calls = getattr(module, name), []

    def compiled(*arguments):
        step = original(*arguments)

        def stepped(*inputs):
            calls.append(1)
            if len(calls) == after:
                os.kill(os.getpid(), signal.SIGINT)
            return step(*inputs)

        return stepped

    monkeypatch.setattr(module, name, compiled)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The same two, stopped at step 3."""
    folders = [tmp_path_factory.mktemp("stopped") / name for name in "ab"]
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        on_one_device(patch)
        interrupting(patch, ensemble, "compile_steps", 3)
        with pytest.raises(Interrupted, match=r"stopped at step 3 of 6 and saved in .*/a, .*/b;"):
            train_together(configs(TINY, RUNS), folders)
    return folders


@pytest.mark.thorough(tenth=False)
def test_a_stop_before_the_first_step_saves_all_and_draws_nothing(tmp_path, monkeypatch):
    """A run that begins with trained weights would have a picture of step 0."""
    folders = [tmp_path / name for name in "ab"]
    on_one_device(monkeypatch)
    monkeypatch.setattr(ensemble, "stop_signals", lambda: nullcontext(lambda: True))
    monkeypatch.setattr(ensemble, "compile_steps", lambda *_: pytest.fail)  # which no step calls
    monkeypatch.setattr(ensemble, "train_flops", lambda _: 0)
    monkeypatch.setattr(Recorder, "draw_beginning", lambda *_: pytest.fail("it draws"))
    with pytest.raises(Interrupted, match=r"stopped at step 0 of 6 and saved in .*/a, .*/b;"):
        train_together(configs(TINY, RUNS), folders)
    assert [int(arrays_of(folder)["step"]) for folder in folders] == [0, 0]


@pytest.fixture
def folders(stopped, tmp_path, monkeypatch):
    """A copy of them, to go on with."""
    without_pictures(monkeypatch)
    on_one_device(monkeypatch)
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in stopped]


@pytest.mark.thorough
def test_stopping_and_resuming_changes_nothing(ensemble_run, folders):
    assert [int(arrays_of(folder)["step"]) for folder in folders] == [3, 3]
    train_together(configs(TINY, RUNS), folders)
    for here, there in zip(folders, ensemble_run, strict=True):
        assert_same(arrays_of(here), arrays_of(there), rtol=0, atol=0)
        assert logged(here) == logged(there)


@pytest.mark.thorough
def test_a_member_goes_on_alone_and_the_others_catch_up(ensemble_run, folders):
    """One is finished by `train`; the one left goes on as an ensemble of one."""
    loop.train(configs(TINY, RUNS)[1], folders[1])
    assert_same(arrays_of(folders[1]), arrays_of(ensemble_run[1]), atol=3e-4, rtol=1e-5)
    assert "ensemble" in json.loads((folders[1] / "run.json").read_text())
    train_together(configs(TINY, RUNS), folders)
    assert_same(arrays_of(folders[0]), arrays_of(ensemble_run[0]), atol=3e-4, rtol=1e-5)


@pytest.mark.thorough
def test_unlike_steps_go_on_from_the_newest_common_one(ensemble_run, folders, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        interrupting(patch, loop, "compile_train_step", 2)
        with pytest.raises(Interrupted, match="stopped at step 5"):
            loop.train(configs(TINY, RUNS)[1], folders[1])
    train_together(configs(TINY, RUNS), folders)
    assert (
        "resuming from step 3, the newest that all members have ({'a': 3, 'b': 5})" in caplog.text
    )
    for here, there in zip(folders, ensemble_run, strict=True):
        assert_same(arrays_of(here), arrays_of(there), rtol=0, atol=0)
        assert logged(here) == logged(there)
        assert len((here / "metrics.jsonl").read_text().splitlines()) == 3


@dataclass(frozen=True)
class Seeded:
    """A number of the run and its step; Ctrl-C comes once, amid step 4 of the first member."""

    every_steps: int = 2
    signal_once: str = ""
    metrics = ("number",)
    higher_is_better = ()

    def __call__(self, run, dataset, begun):
        once = Path(self.signal_once)
        if (run.step, run.config.seed) == (4, 0) and once.exists():
            once.unlink()
            os.kill(os.getpid(), signal.SIGINT)
        begun(1)
        return {"number": 10 * run.config.seed + run.step}


@pytest.mark.thorough
def test_members_have_evaluators_also_after_a_stop_amid_one(ensemble_run, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    on_one_device(monkeypatch)
    once = tmp_path / "once"
    once.touch()
    members, folders = configs(TINY, RUNS), [tmp_path / name for name in "ab"]
    for config in members:
        with config.unlocked():
            config.evaluators = {"known": spec(Seeded, signal_once=str(once))}
            config.best_by = "known/number"
    with pytest.raises(Interrupted, match="stopped while evaluating step 4 of 6"):
        train_together(members, folders)
    assert [max(int(p.name) for p in (f / "checkpoints").iterdir()) for f in folders] == [4, 4]
    train_together(members, folders)
    for seed, (here, there) in enumerate(zip(folders, ensemble_run, strict=True)):
        assert_same(arrays_of(here), arrays_of(there), rtol=0, atol=0)
        found = [(r["step"], r["eval/known/number"]) for r in logged(here) if len(r) == 2]
        assert found == [(2, 10 * seed + 2), (4, 10 * seed + 4)]
        best = json.loads((here / "run.json").read_text())["best"]
        assert (best["step"], best["value"]) == (2, 10 * seed + 2)


@pytest.mark.thorough
def test_a_member_that_is_not_finite_spoils_no_other(ensemble_run, tmp_path, monkeypatch):
    evaluated: list[Path] = []
    paged: list[Path] = []
    without_pictures(monkeypatch)
    monkeypatch.setattr(ensemble, "evaluate_once", lambda run, *_: evaluated.append(run.workdir))
    monkeypatch.setattr(ensemble, "page", paged.append)
    folders = [tmp_path / name for name in "xab"]
    clip = {"optimizer.clip_norm": 1e30}
    wild = {"optimizer.learning_rate": 1e30, **clip}
    # The good ones are those of `ensemble_run`, with a clip that their gradients don't reach.
    with pytest.raises(MembersFailed, match=r"/x: the .* is not finite in step \d") as failed:
        train_together(configs(TINY, [wild, *RUNS]), folders)
    assert list(failed.value.failures) == [folders[0]]
    assert "\n" not in str(failed.value)
    assert evaluated == paged == folders[1:]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(arrays_of(folders[0])))
    for here, there in zip(folders[1:], ensemble_run, strict=True):
        assert_same(arrays_of(here), arrays_of(there), atol=3e-4, rtol=1e-5)


@pytest.mark.faults
def test_an_ensemble_that_stands_still_says_where(tmp_path, monkeypatch):
    stacks, until = tmp_path / "a" / "stacks.txt", time.monotonic() + 120

    def batches(*arguments):
        for i, batch in enumerate(members.member_batches(*arguments)):
            while i == 3 and time.monotonic() < until and not stacks_name_a_step():
                time.sleep(0.05)
            yield batch

    def stacks_name_a_step():
        return stacks.exists() and "s after step " in stacks.read_text()

    without_pictures(monkeypatch)
    monkeypatch.setattr(ensemble, "member_batches", batches)
    folders = [tmp_path / name for name in "ab"]
    told = Watchdog(seconds=0.5, times=0.0, exits=False)
    train_together(configs(TINY, RUNS), folders, watchdog=told)
    assert stacks_name_a_step()
    assert int(arrays_of(folders[1])["step"]) == 6


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_steps": 8}, "num_steps: 6 there, 8 here"),
        ({"batch_size": 24}, "batch_size: 16 there, 24 here"),
        ({"model.hidden_size": 32}, "model.hidden_size: 16 there, 32 here"),
        ({"model.dropout": 0.2}, "model.dropout"),
        ({"data.test_fraction": 0.3}, "data.test_fraction"),
        ({"objective.weight": spec(weights.SoftMinSNR)}, "weight._target_"),
        ({"ema_decays": (0.5, 0.99)}, "ema_decays"),
        ({"optimizer.warmup_steps": 3}, "optimizer.warmup_steps: 2 there, 3 here"),
        ({"objective.uniforms": spec(choices.uniforms.Stratified)}, "objective.uniforms"),
    ],
)
def test_what_keeps_configs_apart(changes, reason):
    assert reason in (incompatibility([tiny_config(PARTS), tiny_config(PARTS, **changes)]) or "")


def test_members_may_differ_in_the_dropout_of_each_part():
    def config(**rates):
        config = tiny_config(PARTS).unlock()
        with config.ignore_type():
            config.condition_dropout = ConfigDict(rates)
        return config

    assert incompatibility([config(text=0.1, all=0.1), config(text=0.2, all=0.1)]) is None
    assert "condition_dropout.all" in (incompatibility([config(), config(all=0.1)]) or "")


def test_refusals_write_nothing(tmp_path):
    each = [tiny_config(), tiny_config(batch_size=24)]
    with pytest.raises(UserError, match=r"can't train as one program \(batch_size"):
        train_together(each, [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UserError, match="same folder"):
        train_together([each[0]] * 2, [tmp_path / "a", tmp_path / "b" / ".." / "a"])
    with pytest.raises(UserError, match="one folder and one command per member"):
        train_together(each, [tmp_path / "a"])
    assert list(tmp_path.iterdir()) == []


def test_parameters_split_over_devices_are_no_members():
    config = tiny_config(**{"mesh.fsdp": 8})
    assert "mesh.fsdp" in (incompatibility([config, config]) or "")
