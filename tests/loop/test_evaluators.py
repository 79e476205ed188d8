"""Metrics during training: lines, best checkpoint, stops and resumes, and what is refused."""

import json
import math
import os
import shutil
import signal
import time
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pytest

import diffjax
from configs import digits as digits_config
from diffjax import config_files
from diffjax.comparison.results import last_step
from diffjax.data import all_examples, digits
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.host.interrupts import Interrupted
from diffjax.host.run_files import read_json
from diffjax.loop import evaluations, loop, recorder
from diffjax.loop.evaluations import Evaluations, check_evaluators
from diffjax.loop.logging import join
from diffjax.loop.training import Training, checkpoints_of
from diffjax.process.targets import Noise
from diffjax.reports.pictures import save_png
from diffjax.reports.run_page import write_report
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.measuring.evaluators import Samples, Validation
from diffjax.runs.setup import Setup, set_up
from diffjax.spec import spec
from diffjax.studies.validation import loss_by_log_snr
from experiments.flags import cli
from tests.support.shared_parts import shared_parts
from tests.support.tiny_run import arrays_of, assert_same, logged, trained_config

VALUES = {1: 5.0, 2: 3.0, 3: 4.0, 4: 2.5, 5: math.nan, 6: 3.5}
PACKAGES = ("diffjax", "tests")


@dataclass(frozen=True)
class Known:
    """A number that is known for each step, and the mean of the live weights of the last layer."""

    every_steps: int = 1
    metrics = ("value", "mean")
    higher_is_better = ("mean",)

    def __call__(self, run, dataset, begun):
        begun(1)
        kernel = np.asarray(run.weights("live")["final_conv"]["kernel"])
        if math.isnan(VALUES[run.step]):
            raise UserError("5 of 20 samples are not finite")
        return {"value": VALUES[run.step], "mean": kernel.mean()}


@dataclass(frozen=True)
class Counted:
    """Two batches that every process has, and three others."""

    every_steps: int = 1
    metrics = ("none",)
    higher_is_better = ()

    def __call__(self, run, dataset, begun):
        for number in (0, 1, 0, 2, 0):
            begun(number)
        return {"none": math.nan}


def config_of(best_by: str = "known/value", evaluators: Any = None, **changes: Any):
    config = trained_config(checkpoint_every_steps=3, **changes)
    with config.unlocked():
        config.evaluators = evaluators or {"known": spec(Known)}
        config.best_by = best_by
    return config.lock()


def leave_out_the_rest(patch):
    """Neither pictures nor the evaluation at the end."""
    patch.setattr(recorder, "grid_drawer", lambda *_: lambda state: None)
    patch.setattr(loop, "measure", lambda *_, **__: None)
    patch.setattr(loop, "page", lambda workdir: workdir / "report.html")
    shared_parts(patch)


@pytest.fixture
def _alone(monkeypatch):
    leave_out_the_rest(monkeypatch)


def best_of(workdir) -> dict[str, Any]:
    return (read_json(workdir / "run.json") or {})["best"]


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        leave_out_the_rest(patch)
        workdir = tmp_path_factory.mktemp("measured") / "run"
        loop.train(config_of(), workdir)
    return workdir


def values_of(workdir, metric: str = "value") -> dict[int, float]:
    key = f"eval/known/{metric}"
    steps = [record["step"] for record in logged(workdir) if key in record]
    assert len(set(steps)) == len(steps), "no step twice"
    return {record["step"]: record[key] for record in logged(workdir) if key in record}


def test_each_value_is_a_line_and_the_best_checkpoint_is_kept(measured_run):
    np.testing.assert_equal(values_of(measured_run), VALUES)
    assert best_of(measured_run) == {"metric": "known/value", "step": 4, "value": 2.5}
    run = diffjax.load(measured_run, step="best", allowed_packages=PACKAGES)
    assert run.step == 4
    kernel = np.asarray(run.weights("live")["final_conv"]["kernel"])
    assert kernel.mean() == pytest.approx(values_of(measured_run, "mean")[4], rel=1e-6)
    page = write_report(measured_run).read_text()
    assert "step 4, value (known) 2.50" in page
    for metric in ("value", "mean"):
        assert page.count(f"{metric} (known) against training step") == 1
    assert "best: step 4" in page


def test_checkpoints_by_their_step(measured_run):
    assert diffjax.load(measured_run, step=3, allowed_packages=PACKAGES).step == 3
    with pytest.raises(UserError, match="no checkpoint of step 4: there are 0, 3, 6"):
        diffjax.load(measured_run, step=4, allowed_packages=PACKAGES)
    with pytest.raises(UserError, match="step='first': it is the number of a step, or 'best'"):
        diffjax.load(measured_run, step="first", allowed_packages=PACKAGES)
    parsed = [cli._Step().parse(text) for text in ("best", "400")]
    assert parsed == ["best", 400]
    with pytest.raises(ValueError, match="or best"):
        cli._Step().parse("newest")


def test_a_run_without_a_best_checkpoint_says_what_keeps_one(trained_run):
    with pytest.raises(UserError, match=r"no best checkpoint: train it with config\.best_by"):
        diffjax.load(trained_run, step="best", allowed_packages=PACKAGES)


@pytest.mark.thorough(tenth=False)
@pytest.mark.usefixtures("_alone")
def test_a_killed_run_neither_doubles_nor_loses_values(measured_run, tmp_path):
    """As if killed after the value of step 6, before its checkpoint was on disk."""
    copy = shutil.copytree(measured_run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "6")
    loop.train(config_of(), copy)
    assert json.dumps(logged(copy)) == json.dumps(logged(measured_run))
    assert best_of(copy)["step"] == 4
    assert diffjax.load(copy, step="best", allowed_packages=PACKAGES).step == 4


@pytest.mark.usefixtures("_alone")
def test_a_run_that_is_rolled_back_has_the_best_state_before(measured_run, tmp_path):
    """Step 4 is the best and step 2 was the best at the checkpoint of step 3, which is left."""
    copy = shutil.copytree(measured_run, tmp_path / "run")
    assert sorted(int(path.name) for path in (copy / "best").glob("[0-9]*")) == [2, 4]
    setup = set_up(config_of(), (8, 8, 1), digits().condition)
    with closing(checkpoints_of(setup, copy)) as checkpoints:
        training = Training(setup, digits(), copy, checkpoints)
        with closing(Evaluations(training, 3)) as rolled_back:
            assert rolled_back.best() == {"metric": "known/value", "step": 2, "value": 3.0}
    assert best_of(copy)["step"] == 2
    assert diffjax.load(copy, step="best", allowed_packages=PACKAGES).step == 2
    assert (copy / "best_left" / "4").exists()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(
    ("stop_at", "step"), [(9, 4), pytest.param(13, 6, marks=pytest.mark.thorough)]
)
def test_a_stop_amid_an_evaluator_saves_and_goes_on_there(measured_run, tmp_path, stop_at, step):
    """`should_stop` is called before step 1, after each, and before each batch of an evaluator."""
    config, calls = config_of("known/mean"), []
    setup = set_up(config, (8, 8, 1), digits().condition)

    def should_stop():
        calls.append(1)
        return len(calls) == stop_at

    loop.workdirs.claim(tmp_path, config)
    with closing(checkpoints_of(setup, tmp_path)) as checkpoints:
        training = Training(setup, digits(), tmp_path, checkpoints, should_stop)
        with pytest.raises(Interrupted, match=f"stopped while evaluating step {step} of 6 and"):
            loop.train_and_evaluate(training)
        assert max(checkpoints.steps()) == step
    assert max(values_of(tmp_path)) == step - 1
    loop.train(config, tmp_path)
    assert json.dumps(logged(tmp_path)) == json.dumps(logged(measured_run))
    assert_same(arrays_of(tmp_path), arrays_of(measured_run), rtol=0, atol=0)
    means = values_of(tmp_path, "mean")
    best = max((step for step in means if step != 5), key=means.get)
    assert best_of(tmp_path)["step"] == best


def test_a_stop_during_the_first_checkpoint_makes_no_step(tmp_path, monkeypatch):
    config = config_of("known/mean")
    setup = set_up(config, (8, 8, 1), digits().condition)
    monkeypatch.setattr(loop, "train_flops", lambda setup: 0)
    monkeypatch.setattr(loop, "compile_train_step", lambda *_: pytest.fail)  # which no step calls
    loop.workdirs.claim(tmp_path, config)
    with closing(checkpoints_of(setup, tmp_path)) as checkpoints:
        training = Training(setup, digits(), tmp_path, checkpoints, lambda: True)
        with pytest.raises(Interrupted, match=f"stopped at step 0 of 6 and saved in {tmp_path};"):
            loop.train_and_evaluate(training)
        assert checkpoints.steps() == [0]


@pytest.mark.thorough(tenth=False)
def test_a_stop_amid_a_picture_saves_and_the_picture_is_drawn_later(
    measured_run, tmp_path, monkeypatch
):
    leave_out_the_rest(monkeypatch)
    drawn: list[int] = []

    def drawer(parts, dataset, workdir):
        def draw(state):
            drawn.append(int(state.step))
            if len(drawn) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30.0)
            save_png(recorder.picture_of(workdir, drawn[-1]), np.zeros((1, 8, 8, 1)))

        return draw

    monkeypatch.setattr(recorder, "grid_drawer", drawer)
    with pytest.raises(Interrupted, match="stopped while drawing at step 4 of 6 and saved in"):
        loop.train(config_of(), tmp_path)
    loop.train(config_of(), tmp_path)
    assert drawn == [4, 4, 6]
    assert json.dumps(logged(tmp_path)) == json.dumps(logged(measured_run))
    assert_same(arrays_of(tmp_path), arrays_of(measured_run), rtol=0, atol=0)


@pytest.mark.usefixtures("_alone")
def test_a_run_ends_where_its_metric_is_no_better_and_stays_so_until_it_has_more_patience(
    measured_run, tmp_path
):
    """The value of step 3 is no better than that of step 2; all that was there is kept."""
    impatient, patient = (config_of(patience_evaluations=number) for number in (1, 3))
    loop.train(impatient, tmp_path)
    first, steps = logged(tmp_path), (0, 3)
    assert values_of(tmp_path) == {step: VALUES[step] for step in (1, 2, 3)}
    assert best_of(tmp_path)["step"] == 2
    assert diffjax.load(tmp_path, allowed_packages=PACKAGES).step == 3
    run = read_json(tmp_path / "run.json") or {}
    assert run["stopped_early"] == {"step": 3, "num_steps": 6}
    assert last_step({"num_steps": 6}, run) == 3

    loop.train(impatient, tmp_path)
    assert logged(tmp_path) == first
    shutil.rmtree(tmp_path / "checkpoints" / "3")  # As if killed before it was on disk.
    loop.train(impatient, tmp_path)
    assert logged(tmp_path) == first
    with closing(Checkpoints(tmp_path / "checkpoints", 5)) as checkpoints:
        assert tuple(checkpoints.steps()) == steps

    loop.train(patient, tmp_path, extend=True)
    assert "stopped_early" not in (read_json(tmp_path / "run.json") or {})
    assert json.dumps(logged(tmp_path)) == json.dumps(logged(measured_run))
    assert_same(arrays_of(tmp_path), arrays_of(measured_run), rtol=0, atol=0)


def test_several_processes_ask_for_a_stop_at_batches_that_all_of_them_have(
    monkeypatch, tmp_path, loaded_run
):
    """Features of real images may be in the cache of one process alone."""
    config, calls = config_of("", {"counted": spec(Counted)}), []
    setup = Setup.of(replace(loaded_run.parts, config=config))

    def should_stop():
        calls.append(1)
        return False

    with closing(checkpoints_of(setup, tmp_path)) as checkpoints:
        training = Training(setup, digits(), tmp_path, checkpoints, should_stop)
        state = setup.init(jax.random.key(0))._replace(step=np.int32(1))
        for processes, expected in ((1, 5), (2, 5 + 2)):
            monkeypatch.setattr(evaluations, "of_first", lambda numbers: numbers)
            monkeypatch.setattr(jax, "process_count", lambda processes=processes: processes)
            Evaluations(training, 1).make(state, join([]), lambda step: None)
            assert len(calls) == expected


def test_without_evaluators_a_run_is_what_it_was(trained_run, measured_run):
    assert_same(arrays_of(measured_run), arrays_of(trained_run), rtol=0, atol=0)


def test_metrics_of_samples_are_those_of_the_evaluation(trained_run, loaded_on_all):
    names = ("frechet_distance", "accuracy", "kernel_distance")
    begun: list[int] = []
    evaluator, run = Samples(names, num_samples=20), loaded_on_all
    found = evaluator(run, run.dataset(), begun.append)
    there = read_json(trained_run / "evaluation.json") or {}
    distances = {name: there[name]["value"] for name in names if name != "accuracy"}
    assert found == {**distances, "accuracy": there["accuracy"]}
    assert begun, "the watchdog hears of each batch"
    assert evaluator.higher_is_better == ("accuracy",)


def test_the_validation_loss_is_that_of_the_comparison(loaded_on_all):
    """Nine images, which eight devices don't divide."""
    run = loaded_on_all
    batch = all_examples(run.dataset().test, 9)
    there = loss_by_log_snr(
        run.model().predict(), run.parts.wired.path, batch["image"],
        run.parts.wired.condition.of_batch(batch), jax.random.key(0), spaces={"noise": Noise()},
    )  # fmt: skip
    found = Validation(num_images=9)(run, run.dataset(), lambda batch: None)
    assert found == {"loss": pytest.approx(there.total("noise").mean, rel=1e-5)}


@pytest.mark.parametrize(
    ("best_by", "evaluators", "said"),
    [
        ("known/valeu", {"known": spec(Known)}, "no evaluator returns 'known/valeu'; did you mean"),
        ("value", {"known": spec(Known)}, "no evaluator returns 'value'; "),
        (None, {"known": spec(Known)}, r"patience_evaluations ends training where config.best_by"),
        ("", {"a": 3}, r"config.evaluators.a=3 is not an evaluator: it has no every_steps"),
        ("", {"a": spec(Samples, metrics=())}, "metrics is empty: name one"),
        ("", {"a": spec(Samples, metrics=("fid",))}, "no metric of samples is called 'fid'"),
        (
            "",
            {"a": spec(Samples, metrics=("mode_weights",))},
            "no mode_weights of digits: it",
        ),
        ("", {"a": spec(Samples, metrics=("cmmd",))}, "no cmmd by classifier:digits: it needs"),
        ("", {"a": spec(Samples, weights="ema-0.9999")}, "weights: no 'ema-0.9999'; did you mean"),
        ("", {"a": spec(Samples, every_steps=0)}, "every_steps=0 must be at least 1"),
        ("", {"a": spec(Validation, space="nosie")}, "'nosie'; did you mean 'noise'"),
    ],
)
def test_what_an_evaluator_can_not_have_is_refused_before_step_1(
    loaded_run, best_by, evaluators, said
):
    patience = {"patience_evaluations": 2} if best_by is None else {}
    config = config_of(best_by or "", evaluators, **patience)
    parts = replace(loaded_run.parts, config=config)
    with pytest.raises(UserError, match=said):
        check_evaluators(parts, digits())


def test_no_accuracy_without_a_classifier_and_no_best_without_evaluators(loaded_run):
    config = config_of("", {"a": spec(Samples, metrics=("accuracy",))})
    with config.unlocked():
        config.evaluation.extractor = spec(pixel_features)
    with pytest.raises(UserError, match=r"evaluators\.a: there is no accuracy of digits by pixels"):
        check_evaluators(replace(loaded_run.parts, config=config), digits())
    config = trained_config(best_by="samples/accuracy")
    with pytest.raises(UserError, match="this run has no evaluators: try evaluators=samples"):
        check_evaluators(replace(loaded_run.parts, config=config), digits())


def test_evaluators_are_an_axis_of_configs_and_their_numbers_are_flags():
    config = digits_config.get_config("evaluators=samples+validation")
    assert (config.name, list(config.evaluators)) == ("digits", ["samples", "validation"])
    flags = {
        "config.evaluators.samples.every_steps": "500",
        "config.evaluators.samples.metrics": "frechet_distance,accuracy",
    }
    config_files.override(config, flags)
    assert config.evaluators.samples.metrics == ("frechet_distance", "accuracy")
    with pytest.raises(UserError, match="no evaluator is called 'sample'; did you mean 'samples'"):
        digits_config.get_config("evaluators=sample")
    assert digits_config.get_config().evaluators.to_dict() == {}
