"""Sweeps: cells, refusals, going on where they stopped, and the table."""

import json
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from diffjax import config_files
from diffjax.errors import UserError
from diffjax.sweeps import cells as cells_module
from diffjax.sweeps import worker
from diffjax.sweeps.cells import Planned, resolved, training_cost
from diffjax.sweeps.sweep import Cost, Sweep
from experiments import sweep
from experiments.flags import cli
from tests.support import tiny_config_file
from tests.support.one_process import Here, sweeps_here

SWEEP = """
from diffjax.sweeps.sweep import Sweep

def get_sweep():
    tiny = {"config.num_steps": 2, "config.batch_size": 16, "config.sampling.num_steps": 2,
            "config.evaluation.num_samples": 20, "config.evaluation.solvers": ("ddim",),
            "config.evaluation.num_steps": (2,)}
    return Sweep("%s", {"objective": ("flow", "reflow"), "path": ("linear",)}, tiny)
"""


def run(*arguments):
    return cli.run(sweep.main, sweep.FLAGS, usage=sweep.USAGE, argv=arguments)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sweep.py"
    path.write_text(SWEEP % "configs/digits.py")
    return path


@pytest.fixture
def tiny_file(tmp_path):
    """The same of the smallest network."""
    path = tmp_path / "tiny_sweep.py"
    path.write_text(SWEEP % tiny_config_file.write(tmp_path))
    return path


@pytest.fixture
def planned_here(monkeypatch):
    """Cells are built in this process, not in one of their own."""
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Here)


def test_cells_are_the_axes_product_under_unlike_names():
    cells = Sweep(
        "c.py", {"objective": ("a", "b"), "model": ("x/2",), "config.seed": (0, 1)}, {"config.n": 3}
    ).cells()
    assert [cell.name for cell in cells] == ["a-seed=0", "a-seed=1", "b-seed=0", "b-seed=1"]
    assert [cell.arm for cell in cells] == ["a", "a", "b", "b"]
    assert cells[3].flags() == [
        "--config=c.py:objective=b,model=x/2", "--config.n=3", "--config.seed=1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("matched", "steps"), [("steps", [900, 450]), ("images", [900, 1800]), ("flops", [900, 600])]
)
def test_cells_are_matched_in_what_the_sweep_says(matched, steps):
    """Each trains until it has had what the first has, and no setting changes but the steps."""
    found = Sweep("c.py", {"objective": ("a", "b"), "config.seed": (0, 1)}, matched=matched)
    costs = {
        f"{arm}-seed={seed}": Cost(n, batch, flops)
        for arm, n, batch, flops in (("a", 900, 8, 2e9), ("b", 450, 4, 3e9))
        for seed in (0, 1)
    }
    cells = found.matched_cells(costs)
    assert [cell.name for cell in cells] == [cell.name for cell in found.cells()]
    for cell, n in zip(cells, [steps[0], steps[0], steps[1], steps[1]], strict=True):
        assert int(cell.overrides.get("config.num_steps", costs[cell.name].num_steps)) == n


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matched": "flop"}, "matched='flop': did you mean 'flops'?"),
        (
            {"matched": "flops", "axes": {"config.num_steps": (1, 2)}},
            "a sweep matched in flops sets config.num_steps: it can't be an axis",
        ),
        ({"axes": {"config.seed": ()}}, "the axis config.seed has no values"),
        ({"axes": {"config.seed": (0, 1, 0)}}, "the axis config.seed has 0 twice"),
        *(
            ({"axes": {axis: (1, 2)}}, f"{axis} can't be an axis, since it needs no new training")
            for axis in (
                "config.sampling.guidance_scale",
                "config.evaluation.num_samples",
                "config.weights",
            )
        ),
    ],
)
def test_a_sweep_that_can_not_be_is_refused(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Sweep(**{"config": "c.py", "axes": {}, **change})


def test_what_can_not_be_counted_is_matched_in_images():
    found = Sweep("c.py", {"objective": ("a", "b")}, matched="flops")
    with pytest.raises(UserError, match=r"flops of b can't be counted: use matched='images'"):
        found.matched_cells({"a": Cost(9, 8, 2e9), "b": Cost(9, 8, None)})


def fashion_files(folder):
    """The four files of Fashion-MNIST, with a few images of nothing."""
    for name, n in (("train", 20), ("t10k", 20)):
        images, labels = np.zeros((n, 28, 28), np.uint8), np.arange(n).astype(np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
            (folder / f"{name}-{kind}-ubyte").write_bytes(head + array.tobytes())
    return str(folder)


SWEEPS_HERE = sorted(Path("configs/sweeps").glob("*.py"))


def arms_of(path):
    """A sweep that lies here, and one cell of each arm: seeds change no shapes."""
    found = config_files.returned_by(str(path), "get_sweep", Sweep)
    return found, list({cell.arm: cell for cell in found.cells()}.values())


def test_every_cell_of_the_sweeps_here_has_settings_that_there_are():
    assert SWEEPS_HERE
    for path in SWEEPS_HERE:
        _, cells = arms_of(path)
        assert cells, path
        for cell in cells:
            assert resolved(cell).num_steps > 0, (path, cell.name)


# Whose arms are among those of the sweep of every objective, or differ in no shape.
LIKE_OTHERS = ("digits_choices", "digits_objectives", "colours_known")


@pytest.mark.thorough
@pytest.mark.parametrize("path", SWEEPS_HERE, ids=lambda path: path.stem)
def test_the_cells_of_the_sweeps_here_fit_together(path, tmp_path):
    found, cells = arms_of(path)
    data = {"config.data.path": fashion_files(tmp_path)} if "fashion" in found.config else {}
    for cell in cells[:1] if path.stem in LIKE_OTHERS else cells:
        fitting = replace(cell, overrides={**cell.overrides, **data})
        assert training_cost(resolved(fitting)).num_steps > 0, cell.name


def test_what_differs_in_its_seed_alone_is_built_once(monkeypatch, tmp_path):
    def counting(config, counted):
        built.append(config)
        return training_cost(config, counted)

    built = []
    monkeypatch.setattr(cells_module, "training_cost", counting)
    axes = {"config.batch_size": (8, 16), "config.seed": (0, 1, 2)}
    cells, costs, *_ = cells_module.plan_cells(Sweep(str(tiny_config_file.write(tmp_path)), axes))
    assert len(cells) == 6
    assert len(built) == 2
    for cell in cells:
        assert costs[cell.name].batch_size == dict(cell.axes)["config.batch_size"]


def test_a_dry_run_names_what_is_left_out_and_why(tiny_file, planned_here, capsys):
    assert run(f"--sweep={tiny_file}", "--dry_run") == 0
    said = capsys.readouterr()
    assert "left out: reflow: " in said.err
    assert "needs a source for each training image" in said.err
    config = tiny_file.parent / "tiny.py"
    assert said.out.startswith(f"flow: --config={config}:objective=flow,path=linear")


def test_what_leaves_several_cells_out_is_one_line(capsys):
    left_out = {"a": "it does not fit", "b": "no such setting", "c": "it does not fit"}
    sweep.print_left_out(Planned([], {}, left_out, []))
    assert capsys.readouterr().err.splitlines() == [
        "left out: a, c: it does not fit",
        "left out: b: no such setting",
    ]


def test_what_all_cells_share_can_be_given_from_outside(tiny_file, planned_here, capsys):
    argv = (f"--sweep={tiny_file}", "--dry_run", "--override=config.batch_size=8")
    assert run(*argv, "--override=config.seed=3") == 0
    said = capsys.readouterr().out
    # In place of the file's own.
    assert "--config.batch_size=8 " in said
    assert "--config.batch_size=16" not in said
    assert "--config.seed=3" in said


@pytest.mark.parametrize(
    ("override", "message"),
    [("seed=3", "not of the form"), ("config.seed", "not of the form")],
)
def test_what_is_no_setting_is_refused(file, override, message, capsys):
    assert run(f"--sweep={file}", "--dry_run", f"--override={override}") == 2
    assert message in capsys.readouterr().err


def test_an_axis_is_not_overridden():
    with pytest.raises(UserError, match="is an axis"):
        sweep.overrides(["config.seed=3"], Sweep("c.py", {"config.seed": (0, 1)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"location": "/tmp/other.py"}, "cell flow does not use configs/digits.py"),
        ({"location": "configs/digits.py/../x.py:a=b"}, "cell flow does not use configs/digits.py"),
        ({"name": "../flow"}, "'../flow' can't be a cell's name"),
        ({"name": "/tmp/flow"}, "'/tmp/flow' can't be a cell's name"),
        ({"name": "a\\b"}, "can't be a cell's name"),
        ({"name": ".."}, "'..' can't be a cell's name"),
        ({"name": ""}, "'' can't be a cell's name"),
        ({"name": 3}, "is damaged (TypeError("),
        ({"location": None}, "is damaged (AttributeError("),
        (None, "is damaged (TypeError("),
    ],
)
@pytest.mark.parametrize("how", ["--worker", "--cells=flow"])
def test_what_somebody_put_into_a_begun_sweep_is_refused(
    file, tmp_path, change, message, how, capsys
):
    """It would run another config file, or train in another folder."""
    (cell,) = Sweep("configs/digits.py", {"objective": ("flow",)}).cells()
    plain = {**asdict(cell), "name": "flow"}
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": [plain], "ensembles": [["flow"]]}))
    assert sweep.read_cells(tmp_path, Sweep("configs/digits.py", {}))[0].name == "flow"
    tampered = None if change is None else {**plain, **change}
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": [tampered], "ensembles": []}))
    assert run(f"--sweep={file}", f"--workdir={tmp_path}", how) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert str(tmp_path / "sweep.json") in line


@pytest.mark.process
def test_a_sweep_is_a_folder_of_runs_and_a_table(
    tiny_file, planned_here, tmp_path, capsys, monkeypatch
):
    """Its worker and its training are processes."""
    folder = tmp_path / "sweep"
    assert run(f"--sweep={tiny_file}", f"--workdir={folder}") == 0
    table = capsys.readouterr().out
    assert (folder / "report.html").exists()
    assert table.startswith("Matched in steps. Fréchet distance, lower is better.")
    result = json.loads((folder / "flow" / "evaluation.json").read_text())
    own = f"{result['frechet_distance']['value']:#.3g}"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    verdict = ["flow", own, "–", "–", "–", "nothing to compare it with"]
    assert any(row[:6] == verdict and row[6].startswith("heun, NFE 6; 2 steps") for row in rows)
    assert [row[:2] for row in rows if row[0] == "ddim"] == [["ddim", "4"]]
    assert ["heun", "6", own] in rows
    command = shlex.split(json.loads((folder / "flow" / "run.json").read_text())["command"])
    assert command[:3] == ["python", "-m", "experiments.train"]
    assert command[-1] == f"--workdir={folder / 'flow'}"
    # A cell that can't go on is named; nothing of it is lost.
    sweeps_here(monkeypatch)
    (folder / "flow" / "config.json").write_text("{}")
    assert run(f"--sweep={tiny_file}", f"--workdir={folder}") == 2
    assert "failed: flow" in capsys.readouterr().err
    assert "holds a run with another config" in (folder / "flow" / "output.txt").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "defines no get_sweep()"), ("def get_sweep(): return 3", "returns int, no Sweep")],
)
def test_what_is_no_sweep_is_refused(file, content, message, capsys):
    file.write_text(content)
    assert run(f"--sweep={file}") == 2
    assert message in capsys.readouterr().err


def test_all_cells_are_extended_by_the_flag_of_training(tiny_file, tmp_path, monkeypatch, capsys):
    """The flag goes to the workers, from them to the processes of cells, and to `train`."""
    for extend, words in ((False, []), (True, ["--extend"]), ("restart", ["--extend=restart"])):
        made = sweep.worker_command("s.py", tmp_path, extend)
        assert [word for word in made if word.startswith("--extend")] == words
        args = SimpleNamespace(sweep="s.py", search=None, extend=extend)
        assert sweep.sweep_command(args, tmp_path, {}).split()[5:] == words
    started, calls = [], []

    def popen(command, **how):
        started.append(command)
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    cell = Sweep("c.py", {"objective": ("a",)}).cells()[0]
    (tmp_path / cell.name).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(worker.subprocess, "Popen", popen)
        command = sweep.cells_command("s.py", tmp_path, True)
        assert worker.in_subprocess(command, tmp_path)((cell,), (), bool) == 0
    assert started[0][-2:] == ["--extend", f"--cells={cell.name}"]

    def train(config, workdir, command, *, extend):
        calls.append((workdir, extend))
        raise UserError("it stays as it is")

    monkeypatch.setattr(cells_module, "resolved", lambda cell: None)
    monkeypatch.setattr(cells_module, "train", train)
    errors = cells_module.train_cells([cell], tmp_path, extend="continue")
    assert errors == {cell.name: "it stays as it is"}
    assert calls == [(tmp_path / cell.name, "continue")]
    assert run(f"--sweep={tiny_file}", "--extend", "--ensemble=2") == 2
    assert "--extend trains each cell by itself" in capsys.readouterr().err
