"""What the command line takes, Python takes by the same names, and refuses in the same words."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import choices, lookup
from diffjax.conditions import Classes
from diffjax.conditions.classes import labels_called
from diffjax.data import colours, digits
from diffjax.errors import UserError
from diffjax.host.run_files import read_metrics
from diffjax.reports import run_page
from diffjax.runs.measuring import evaluating
from diffjax.runs.measuring.evaluating import wanted_of
from diffjax.runs.measuring.measure import Wanted
from diffjax.runs.samples.model import Request
from diffjax.sampling import grids, guidance, solvers
from diffjax.spec import build
from experiments import sample
from experiments.flags import cli
from tests.support.old_runs import OLD_RUN


@pytest.fixture(scope="module")
def run(old_run):
    return old_run


def handed(run, *labels, **how):
    """The recipe, request and batch size that `sample` passes to the model."""
    calls = []

    def drawn(recipe, request, batch_size):
        calls.append((recipe, request, batch_size))

    def model(weights):
        run.model(weights)
        spied = SimpleNamespace(wired=run.parts.wired, sample=drawn)
        spied.seamless = lambda how: spied
        return spied

    spy = dataclasses.replace(run)
    object.__setattr__(spy, "model", model)
    spy.sample(*labels, **how)
    return calls[0]


def test_parts_have_the_names_of_the_flags(run):
    how = {"solver": "dpmpp_2m", "grid": "karras", "guidance": "cfg+limited", "against": "label:3"}
    recipe, request, size = handed(run, 16, **how, num_steps=7, guidance_scale=3.0)
    assert recipe.solver is lookup.solver_called("dpmpp_2m")
    assert recipe.grid == grids.Karras()
    assert recipe.guidance == build(lookup.guidance_called("cfg+limited"))
    assert recipe.against == guidance.OtherCondition("3")
    assert (recipe.num_steps, recipe.guidance_scale, request.seed, size) == (7, 3.0, 0, 256)
    np.testing.assert_array_equal(request.condition, np.arange(16) % 10)
    values = {
        "solver": solvers.heun(),
        "grid": grids.Cosine(),
        "guidance": guidance.Clipped(),
        "against": guidance.NullCondition(),
    }
    recipe = handed(run, [1], **values)[0]
    assert {name: getattr(recipe, name) for name in values} == values
    assert handed(run, [1])[0] == run.recipe


@pytest.mark.parametrize("table", ["solver", "grid", "guidance", "against"])
def test_every_row_of_the_tables_is_a_name(run, table):
    rows = {
        "solver": choices.SOLVERS,
        "grid": choices.GRIDS,
        "guidance": choices.GUIDANCE,
        "against": choices.AGAINST,
    }[table]
    for name, row in rows.items():
        assert getattr(handed(run, [1], **{table: name})[0], table) == build(row)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"solver": "hein"}, "no solver is called 'hein'; did you mean 'heun'"),
        ({"grid": "karas"}, "no grid is called 'karas'; did you mean 'karras'"),
        ({"guidance": "cgf"}, "no guidance is called 'cgf'; did you mean 'cfg'"),
        ({"against": "lable:3"}, "no against is called 'lable'; did you mean 'label'"),
        ({"weights": "life"}, "no weights 'life'; did you mean 'live'"),
        ({"grid": "found"}, "no grid has been found yet"),
        ({"grid": "found", "solver": solvers.heun()}, "use that name"),
        ({"num_steps": 2.5}, "num_steps=2.5: it is a whole number from 1"),
        ({"num_steps": 0}, "num_steps=0: it is a whole number from 1"),
        ({"batch_size": 0}, "batch_size=0: it is a whole number from 1"),
        ({"seed": 2**32}, "seed=4294967296: it is a whole number from -2147483647 to 2147483647"),
        ({"seed": 1.0}, r"seed=1\.0: it is a whole number"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan must be finite"),
        ({"condition": 0}, "the number of samples=0: it is a whole number from 1"),
        ({"condition": [3, 99]}, "no label is called 99; this run has 10, from 0 to 9"),
        ({"condition": [-1]}, "no label is called -1"),
        ({"condition": [10]}, "no label is called 10"),
        ({"condition": [0.5]}, r"no label is called 0\.5"),
        ({"condition": ["12"]}, "no label is called '12'"),
    ],
)
def test_what_is_none_is_refused_in_one_line(run, how, said):
    with pytest.raises(UserError, match=said) as caught:
        run.sample(how.pop("condition", [1]), **how)
    assert "\n" not in str(caught.value)


def test_conditions_have_the_names_of_the_flags(run):
    for named, labels in (
        ({"labels": [3, 7]}, [3, 7]),
        ({"labels": 3}, [3]),  # a label, as --labels=3 is
        ({"prompts": "7"}, [7]),
        ({"num_samples": 3}, [0, 1, 2]),
        ({"labels": ["3", "7"], "num_samples": 5}, [3, 7, 3, 7, 3]),
    ):
        assert handed(run, **named)[1].condition.tolist() == labels
    np.testing.assert_array_equal(handed(run, [3, 7], num_samples=3)[1].condition, [3, 7, 3])


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({}, r"pass what samples are to show, as labels=\[3, 7\], or how many, num_samples"),
        ({"labels": [3], "prompts": "7"}, "labels= and prompts= are one thing: leave one out"),
        ({"condition": [3], "labels": [3]}, "condition= and labels= are one thing"),
        ({"condition": 3, "num_samples": 4}, "condition=3 is a number of samples too"),
        ({"labels": [99]}, "no label is called 99"),
        ({"labels": [], "num_samples": 4}, "labels= is empty: there are no samples"),
        ({"num_samples": 2.5}, "num_samples=2.5: it is a whole number from 1"),
    ],
)
def test_what_is_no_condition_is_refused(run, named, said):
    with pytest.raises(UserError, match=said) as caught:
        run.sample(**named)
    assert "\n" not in str(caught.value)


def test_an_evaluation_has_the_names_of_the_flags(run, tmp_path, monkeypatch):
    """`run.evaluate` hands the same to `measure` as the command line does."""
    found = wanted_of({"solvers": "ddim", "num_steps": 5, "guidance_scale": [1.0, 2.0], "seed": 3})
    assert found == Wanted(
        solvers=("ddim",), num_steps=(5,), guidance_scales=[1.0, 2.0], seeds=(3,)
    )
    given = wanted_of({"extractor": ["pixels"], "weights": "live", "num_samples": 9})
    assert [each.name for each in given.extractors or ()] == ["pixels:8x8"]
    assert (given.weights, given.num_samples) == (("live",), 9)
    calls = []
    monkeypatch.setattr(evaluating, "measure", lambda *args: calls.append(args) or {"step": 2})
    pages = []
    monkeypatch.setattr(run_page, "write_report", pages.append)
    out = tmp_path / "out"
    assert run.evaluate(digits(), out=out, num_samples=9) == {"step": 2}
    ((its, data, wanted),) = calls
    assert (its.workdir, data.name, wanted.num_samples) == (out, "digits", 9)
    assert pages == [out]
    published = dataclasses.replace(run, workdir=tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt is no folder of a run: name one .*, as out="):
        published.evaluate(digits())
    assert published.evaluate(digits(), out=tmp_path / "of_a_file") == {"step": 2}
    assert (tmp_path / "of_a_file" / "config.json").exists()


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"num_sampels": 9}, "evaluate has no setting 'num_sampels'; did you mean 'num_samples'"),
        ({"solvers": "dim"}, "no solver is called 'dim'; did you mean 'ddim'"),
        ({"extractor": "pixls"}, "no extractor is called 'pixls'; did you mean 'pixels'"),
        ({"seed": 1, "seeds": [2]}, "seeds is given twice"),
        ({"num_steps": 2.5}, r"num_steps\[0\]=2.5 must be a whole number"),
        ({"weights": "ema-0.5", "solvers": [], "num_steps": []}, "no weights 'ema-0.5'"),
    ],
)
def test_what_is_no_setting_of_an_evaluation_is_refused(run, tmp_path, named, said):
    with pytest.raises(UserError, match=said) as caught:
        run.evaluate(digits(), out=tmp_path, **named)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "evaluation.json").exists()


def test_what_a_notebook_prints_is_one_line(run):
    for what in (run, run.parts, run.parts.programs, run.parts.wired, run.model(), run.recipe,
                 run.arrays, run.arrays.abstract, digits(), digits().train):  # fmt: skip
        assert len(repr(what)) < 300
        assert "\n" not in repr(what)
    solver = lookup.solver_called("exp_ab")
    assert repr(solver) == "Solver(adams, order 2, 1 evaluations per step)"


def test_tab_completion_offers_what_there_is():
    assert {"from_pretrained", "load", "train"} <= set(dir(diffjax))
    assert not {"Any", "TYPE_CHECKING"} & set(dir(diffjax))


def test_one_rule_for_labels():
    """A number is the label of that number, a text a name if a class has it, else a number."""
    names = ("10", "3", "7")
    given = [0, 1, 2, "0", "10", "3", "7", "2", np.int64(2), jnp.int32(1)]
    assert labels_called(given, 3, names).tolist() == [0, 1, 2, 0, 0, 1, 2, 2, 2, 1]
    assert labels_called(["cat", "dog"], 2, ("dog", "cat")).tolist() == [1, 0]
    with pytest.raises(UserError, match="no label is called 'cta'; did you mean 'cat'"):
        labels_called(["cta"], 2, ("dog", "cat"))
    assert labels_called([0], 0).tolist() == [0]
    with pytest.raises(UserError, match="this run has no classes: pass the number of samples"):
        labels_called([1], 0)


def test_flags_and_python_have_the_same_labels(run):
    names = ("10", "3", "7", *"abcdefg")
    wired = run.parts.wired._replace(condition=Classes(10, names))
    odd = dataclasses.replace(run, parts=dataclasses.replace(run.parts, wired=wired))
    texts = ["7", "a", "0", "10"]
    flagged, *_ = sample.wanted(odd, texts, 4, None)
    assert flagged.tolist() == handed(odd, texts)[1].condition.tolist() == [2, 3, 0, 0]
    mixed = handed(odd, ["7", 7, np.int32(1)])[1].condition
    assert mixed.tolist() == [2, 7, 1]
    assert handed(odd, jnp.arange(3))[1].condition.tolist() == [0, 1, 2]
    assert len(run.sample([])) == 0


def test_a_model_refuses_what_gives_nan_and_takes_the_null_label(run):
    for wrong in (11, -1):
        with pytest.raises(UserError, match=f"there is no label {wrong}: this run has 10"):
            run.model().sample(run.recipe, Request(np.array([3, wrong])))
    recipe = dataclasses.replace(run.recipe, num_steps=1, guidance_scale=1.0)
    assert np.isfinite(run.model().sample(recipe, Request(np.array([3, 10])))).all()


def test_the_command_line_refuses_in_the_same_words(capsys):
    flags = [f"--workdir={OLD_RUN}", "--labels=3,99"]
    assert cli.run(sample.main, sample.FLAGS, usage="", argv=flags) == 2
    assert "error: no label is called '99'; this run has 10, from 0 to 9" in capsys.readouterr().err


def test_completion_knows_what_there_is():
    assert {"load", "train", "__version__"} <= set(dir(diffjax))


def test_what_is_shown_is_one_short_line(run):
    """Each would print a quarter of a million characters."""
    data, mixed = digits(), colours()
    for shown in (run, data, data.train, data.test, mixed, mixed.train, run.arrays):
        assert len(repr(shown)) < 250
        assert "\n" not in repr(shown)
    assert repr(data.train) == "ArraySource(1,438 images)"
    text = repr(run)
    for part in ("0.1.0", "step 2 of 2", "DiT", "8x8x1", "10 classes", run.config.weights):
        assert part in text
    assert f"{run.parts.wired.num_params:,} parameters" in text


def test_the_run_s_numbers_are_arrays(run):
    arrays, records = run.metrics(), read_metrics(OLD_RUN / "metrics.jsonl")
    assert records == read_metrics(OLD_RUN) == read_metrics(str(OLD_RUN))
    assert arrays["step"].tolist() == [record["step"] for record in records]
    np.testing.assert_array_equal(arrays["loss"], [record["loss"] for record in records])
    assert all(values.shape == (len(records),) for values in arrays.values())


def test_numbers_that_a_record_lacks_are_nan(run, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": "nan", "x": 3}\n'
    )
    arrays = dataclasses.replace(run, workdir=tmp_path).metrics()
    np.testing.assert_array_equal(arrays["loss"], [2.5, np.nan])
    np.testing.assert_array_equal(arrays["x"], [np.nan, 3.0])
    assert dataclasses.replace(run, workdir=tmp_path / "none").metrics()["step"].shape == (0,)
