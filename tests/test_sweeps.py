"""Sweeps: cells, refusals, going on where they stopped, and the table."""

import json
import re

import pytest

from diffjax.errors import UserError
from diffjax.sweeps import Cost, Sweep
from experiments import cli, config_files, sweep
from experiments.sweep_cells import cost

SWEEP = """
from diffjax.sweeps import Sweep

def get_sweep():
    tiny = {"config.num_steps": 2, "config.batch_size": 16, "config.model.hidden_size": 16,
            "config.model.depth": 1, "config.sampling.num_steps": 2,
            "config.evaluation.num_samples": 20, "config.evaluation.solvers": ("ddim",),
            "config.evaluation.num_steps": (2,)}
    return Sweep("configs/digits.py", {"objective": ("flow", "reflow"), "path": ("linear",)}, tiny)
"""


def run(*arguments):
    return cli.run(sweep.main, sweep.FLAGS, usage=sweep.USAGE, argv=arguments)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sweep.py"
    path.write_text(SWEEP)
    return path


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
            "a sweep matched in flops sets config.num_steps: it can be no axis",
        ),
    ],
)
def test_a_match_that_can_not_be_is_refused(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Sweep(**{"config": "c.py", "axes": {}, **change})


def test_what_can_not_be_counted_is_matched_in_images():
    found = Sweep("c.py", {"objective": ("a", "b")}, matched="flops")
    with pytest.raises(UserError, match=r"flops of b can't be counted: match in images"):
        found.matched_cells({"a": Cost(9, 8, 2e9), "b": Cost(9, 8, None)})


def test_every_cell_of_the_sweeps_here_fits_together():
    for cell in config_files.returned_by(
        "configs/sweeps/digits_objectives.py", "get_sweep", Sweep
    ).cells():
        assert cost(cell).num_steps > 0, cell.name


def test_a_dry_run_names_what_is_left_out_and_why(file, capsys):
    assert run(f"--sweep={file}", "--dry_run") == 0
    said = capsys.readouterr()
    assert "left out: reflow: " in said.err
    assert "needs a source for each training image" in said.err
    assert said.out.startswith("flow: --config=configs/digits.py:objective=flow,path=linear")


@pytest.mark.slow
def test_a_sweep_is_a_folder_of_runs_and_a_table(file, tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert run(f"--sweep={file}", f"--workdir={folder}") == 0
    table = (folder / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert table.startswith("Fréchet distance at heun, 2 steps, NFE 6, matched in steps.")
    result = json.loads((folder / "flow" / "evaluation.json").read_text())
    own = f"{result['frechet_distance']['value']:#.3g}"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert ["flow", own, "1", "", ""] in rows
    assert [row[:3] for row in rows if row[0] == "ddim"] == [["ddim", "2", "4"]]
    assert ["heun", "2", "6", own] in rows
    # A cell that can't go on is named; nothing of it is lost.
    (folder / "flow" / "config.json").write_text("{}")
    assert run(f"--sweep={file}", f"--workdir={folder}") == 2
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
