"""Samples for and of other programs, and results in another folder, by the command lines."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from diffjax.data import to_uint8
from diffjax.errors import UserError
from diffjax.host.files import write_json
from diffjax.reports import run_page
from diffjax.runs import workdirs
from diffjax.runs.measuring.results import elsewhere, file_of, keep_earlier
from diffjax.runs.samples import edits
from experiments import edit, evaluate, find_grid, sample
from experiments.flags import cli, published


def run(script, *arguments):
    return cli.run(script.main, script.FLAGS, usage="", argv=arguments)


HOW = ["--num_samples=6", "--solver=ddim", "--num_steps=3", "--guidance_scale=1.5", "--seed=5"]


def test_samples_for_other_programs_are_those_of_the_picture(loaded_once, tmp_path, capsys):
    common = [f"--workdir={loaded_once}", "--labels=3,7", *HOW]
    for out in ("grid.png", "x.npz", "pngs/"):
        assert run(sample, *common, f"--out={tmp_path}/{out}") == 0
    assert f"6 samples in {tmp_path}/pngs" in capsys.readouterr().out
    with np.load(tmp_path / "grid.npz") as picture, np.load(tmp_path / "x.npz") as saved:
        images = to_uint8(picture["images"])
        np.testing.assert_array_equal(saved["arr_0"], images)
        assert saved["arr_1"].tolist() == [3, 7] * 3
    files = sorted((tmp_path / "pngs").iterdir())
    np.testing.assert_array_equal(np.stack([Image.open(file) for file in files]), images[..., 0])
    assert run(sample, *common, f"--out={tmp_path}/pngs") == 2
    assert "has files already" in capsys.readouterr().err
    assert run(sample, *common, f"--out={tmp_path}/y.npz", "--film=a.png") == 2
    assert "--film goes with a picture" in capsys.readouterr().err


@pytest.mark.thorough(tenth=False)
def test_edited_images_are_arrays_too(loaded_once, loaded, tmp_path):
    """And `run.edit` returns those of the command."""
    picture = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(picture).save(tmp_path / "a.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 6:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = [f"--input={tmp_path}/a.png", f"--mask={tmp_path}/mask.png", "--labels=3"]
    how = ["--task=inpaint", "--method=replace", "--solver=ddim", "--num_steps=2"]
    out = f"--out={tmp_path}/new/e.png"
    assert run(edit, f"--workdir={loaded_once}", *arguments, *how, out) == 0
    with np.load(tmp_path / "new" / "e.npz") as saved:
        assert saved["images"].shape == saved["original"].shape == (1, 8, 8, 1)
        np.testing.assert_array_equal(saved["anew"][0, :, :, 0], mask > 0)
        # What is known stays as it is.
        np.testing.assert_allclose(
            saved["images"][:, :, :6], saved["original"][:, :, :6], atol=1e-6
        )
        named = {"method": "replace", "solver": "ddim", "num_steps": 2}
        given = picture[None, :, :, None]
        made = loaded.edit(given, labels=3, task="inpaint", mask=mask, **named)
        for name in ("images", "original", "observed", "anew"):
            np.testing.assert_array_equal(getattr(made, name), saved[name], err_msg=name)
        assert made.difference == pytest.approx(
            np.sqrt(np.mean((saved["images"] - saved["original"]) ** 2))
        )


def test_files_are_edited_as_their_arrays_are(loaded, tmp_path):
    """A colour picture of a grey model is read as grey; a pixel of 128 is white in a mask."""
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(grey).convert("RGB").save(tmp_path / "b.png")
    model = loaded.model()
    for files in (tmp_path / "a.png", [str(tmp_path / "b.png")]):
        read = edits.images_in(model, files, "vary")
        np.testing.assert_allclose(read, grey[None, :, :, None] / 127.5 - 1, atol=1e-6)
    array = grey[None, :, :, None]
    assert edits.images_in(model, array, "vary") is array
    white = edits.mask_in(model, tmp_path / "a.png")
    assert white is not None
    np.testing.assert_array_equal(white[0, :, :, 0], grey >= 128)
    made = edits.Edited(np.ones((2, 8, 8, 1)), np.zeros((2, 8, 8, 1)), array)
    assert repr(made) == "Edited(2 of 8×8×1, difference 1.0000)"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"images": None, "labels": [3]}, "test images have conditions of their own"),
        ({}, "what the images are to show is missing: labels=3"),
        ({"labels": [3], "task": "inpant"}, "did you mean 'inpaint'"),
        ({"labels": [3], "mask": np.ones((8, 8))}, "a mask goes with task=inpaint, not vary"),
        ({"labels": [3], "task": "inpaint", "mask": np.ones((4, 4))}, "the mask is 4×4, and 8×8"),
        ({"labels": [3], "task": "inpaint", "mask": np.zeros((8, 8))}, "the mask is 0 all over"),
        ({"labels": [3], "task": "deblur", "blur": float("nan")}, "blur=nan must be finite"),
        ({"labels": [3], "strength": 0.0}, "leaves none"),
        ({"labels": [33]}, "33"),
        ({"labels": []}, "is an empty list"),
        ({"images": np.zeros((1, 9, 9, 1), "f"), "labels": [3]}, "n×8×8×1 .*, not 1×9×9×1"),
        ({"images": np.zeros((1, 8, 8, 3), np.uint8), "labels": 3}, "n×8×8×1 .* 1×8×8×3 of uint8"),
        ({"images": np.zeros((0, 8, 8, 1), "f"), "labels": 3}, "not 0×8×8×1"),
        ({"images": object(), "labels": 3}, "not a single value of object"),
        ({"images": [], "labels": 3}, "images= is an empty list"),
        ({"images": np.full((1, 8, 8, 1), 200.0), "labels": 3}, "from 200 to 200: they are uint8"),
        ({"images": np.full((1, 8, 8, 1), np.nan), "labels": 3}, "not finite"),
        ({"images": "no.png", "labels": 3}, "'no.png' is no image file"),
        ({"labels": 3, "method": "replace"}, "goes with a measurement, not with vary"),
        ({"labels": [3], "strength": "half"}, "strength='half' must be a number"),
        ({"labels": [3], "task": "deblur", "blur": "x"}, "blur='x' must be a number"),
    ],
)
def test_what_the_command_refuses_to_edit_python_does_too(loaded, given, said):
    with pytest.raises(UserError, match=said):
        loaded.edit(**{"images": np.zeros((1, 8, 8, 1), "f"), **given})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config=configs/digits.py"], "--out is missing"),
        (["--out=o"], "compared with the data of --config, or of a run: --workdir"),
        (["--out=o", "--config=configs/digits.py", "--workdir=w"], "of --config, or of a run"),
        (["--out=o", "--config=configs/digits.py", "--num_samples=9"], "--num_samples is of"),
        (["--out=o", "--config=configs/digits.py", "--data_path=d"], "it is --config.data.path"),
        (["--out=o", "--config=configs/digts.py"], "did you mean 'configs/digits.py'"),
        (["--out=o", "--config="], "--config=FILE.py is missing"),
        (["--out=o", "--config=configs/digits.py", "--config.dta=3"], "unknown flag --config.dta"),
    ],
)
def test_what_does_not_go_with_samples_is_refused(flags, said, capsys):
    assert run(evaluate, "--samples=x.npz", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_run_takes_no_config_and_a_published_file_no_out(capsys):
    assert run(evaluate, "--workdir=runs/a", "--config=configs/digits.py") == 2
    assert "--config is of the data of --samples" in capsys.readouterr().err
    assert run(evaluate, "--pretrained=a.pt", "--workdir=runs/a", "--out=b") == 2
    assert "results of --pretrained go to --workdir" in capsys.readouterr().err


@pytest.mark.thorough(tenth=False)
def test_samples_are_compared_with_the_data_of_a_run_or_a_config(
    trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(evaluate, "write_report", lambda folder: f"{folder}/report.html")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", arr_0=rng.integers(0, 256, (24, 8, 8, 1), np.uint8))
    common = [f"--samples={tmp_path}/x.npz", "--extractor=pixels"]
    assert run(evaluate, *common, f"--workdir={trained}", f"--out={tmp_path}/a") == 0
    printed = capsys.readouterr().out
    assert "Fréchet distance" in printed
    assert f"open {tmp_path}/a/report.html" in printed
    assert run(evaluate, *common, "--config=configs/digits.py", f"--out={tmp_path}/b") == 0
    found = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in "ab"]
    assert found[0] == found[1]
    assert found[0]["samples"]["num_images"] == 24


def test_results_of_a_run_go_to_another_folder(loaded_once, loaded, tmp_path, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in loaded_once.iterdir()}
    monkeypatch.setattr(published, "record", lambda run, dataset: None)
    monkeypatch.setattr(evaluate, "measure", lambda run, *args, **how: write(run.workdir))
    monkeypatch.setattr(evaluate, "write_report", lambda folder: f"{folder}/report.html")

    def write(folder):
        write_json(folder / "evaluation.json", {"by_nfe": []})
        return {"by_nfe": []}

    out = tmp_path / "out"
    assert run(evaluate, f"--workdir={loaded_once}", f"--out={out}") == 0
    assert {path.name: path.stat().st_mtime_ns for path in loaded_once.iterdir()} == before
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "run.json", "metrics.jsonl", "evaluation.json"}
    assert elsewhere(loaded, loaded_once) is loaded
    assert elsewhere(loaded, out).workdir == out  # again, over its own results
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match="out has another run, or its results"):
        elsewhere(loaded, out)


def test_found_grids_go_to_another_folder(loaded_once, tmp_path, monkeypatch, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in loaded_once.iterdir()}
    monkeypatch.setattr(find_grid, "prepare", lambda *args, **how: None)
    found = {"times": [1.0, 0.0], "end_errors": {"uniform": 0.1}}
    monkeypatch.setattr(find_grid, "find", lambda *args: found)
    how = ["--solver=ddim", "--num_steps=1", f"--out={tmp_path / 'out'}"]
    assert run(find_grid, f"--workdir={loaded_once}", *how) == 0
    file = tmp_path / "out" / "grids" / "ddim_1.json"
    assert f"{file}: 1, 0" in capsys.readouterr().out
    assert json.loads(file.read_text())["times"] == [1.0, 0.0]
    assert {path.name: path.stat().st_mtime_ns for path in loaded_once.iterdir()} == before


def test_each_step_keeps_its_evaluation_and_the_page_draws_them(workdir):
    """The newest is `evaluation.json`; those by another recipe are not drawn with it."""
    now = json.loads((workdir / "evaluation.json").read_text())
    assert file_of(workdir, "evaluation.json", 4).name == "evaluation.json"
    assert file_of(workdir, "evaluation.json", 2).name == "evaluation_00000002.json"
    for step, change in ((1, {"frechet_distance": None}), (2, {}), (3, {"weights": "another"})):
        write_json(file_of(workdir, "evaluation.json", step), now | {"step": step} | change)
    counts = now["frechet_distance"]["provenance"] | {"num_samples": 7}
    other = now | {"step": 0, "frechet_distance": {"value": 1.0, "provenance": counts}}
    write_json(workdir / "evaluation_00000000.json", other)
    found = run_page._comparable_steps(workdir, now)
    assert [step for step, _ in found] == [1, 2, 4]
    assert run_page._comparable_steps(workdir, {}) == [] == run_page._step_curves(found[:1])
    # A run that goes on keeps the evaluation that it had.
    (workdir / "checkpoints" / "8").mkdir()
    keep_earlier(workdir, 4)
    assert (workdir / "evaluation.json").exists()
    keep_earlier(workdir, 8)
    assert json.loads((workdir / "evaluation_00000004.json").read_text()) == now
    assert not (workdir / "evaluation.json").exists()


def test_curves_of_several_steps_have_the_numbers_that_there_are():
    steps = [(step, {"accuracy": step / 10, "recall": {"value": None}}) for step in (1, 2)]
    assert [title for title, _ in run_page._step_curves(steps)] == ["accuracy"]


def test_each_checkpoint_that_is_named_is_evaluated(loaded_once, loaded, monkeypatch, capsys):
    """In increasing order where all are, so that the newest is `evaluation.json`."""
    measured = []

    def measure(run, *args, **how):
        measured.append((run.step, run.parts))
        return {"by_nfe": []}

    monkeypatch.setattr(evaluate, "measure", measure)
    monkeypatch.setattr(evaluate, "make_writable", lambda folder: None)
    monkeypatch.setattr(evaluate, "write_report", lambda folder: "report.html")
    for flag, steps in (("all", loaded.steps[1:]), ("4,0", [4, 0]), ("0", [0])):
        measured.clear()
        assert run(evaluate, f"--workdir={loaded_once}", f"--step={flag}") == 0
        assert [step for step, _ in measured] == steps
        assert all(parts is loaded.parts for _, parts in measured), "compiled once"
    assert "step 4\n" in capsys.readouterr().out
    assert run(evaluate, f"--workdir={loaded_once}", "--step=4,5") == 2
    assert "no checkpoint of step 5: there are 0, 4" in capsys.readouterr().err
    assert run(evaluate, f"--workdir={loaded_once}", "--step=4,x") == 2
    assert "the number of a step" in capsys.readouterr().err
    assert run(evaluate, "--pretrained=a.pt", "--workdir=b", "--step=all") == 2
    assert "a published file has one set of weights" in capsys.readouterr().err


def test_another_checkpoint_of_a_run_shares_its_programs(loaded, trained, monkeypatch):
    # What is wrong with the step is wrong by any version, so the error names none.
    monkeypatch.setattr(workdirs, "git_revision", lambda folder: "of another version")
    first = loaded.at(0)
    assert (first.step, first.parts, first.workdir) == (0, loaded.parts, trained)
    leaves = [jax.tree.leaves(each.weights()) for each in (first, loaded)]
    assert any((one != other).any() for one, other in zip(*leaves, strict=True))
    with pytest.raises(UserError, match=r"no checkpoint of step 3: there are 0, 4$"):
        loaded.at(3)
    with pytest.raises(UserError, match="has no best checkpoint"):
        loaded.at("best")
    with pytest.raises(UserError, match=r"step=1\.5 must be a whole number"):
        loaded.at(1.5)
    with pytest.raises(UserError, match="only a run that was loaded has"):
        dataclasses.replace(loaded, arrays=loaded.parts.abstract).at(0)


def test_a_copy_has_the_grids_that_were_found(loaded, workdir, tmp_path):
    (workdir / "grids").mkdir(exist_ok=True)
    (workdir / "grids" / "heun_3.json").write_text("{}")
    copy = elsewhere(dataclasses.replace(loaded, workdir=workdir), tmp_path / "out")
    assert (copy.workdir / "grids" / "heun_3.json").exists()
