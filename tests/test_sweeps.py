"""Sweeps: cells, refusals, going on where they stopped, and the table."""

import json

import pytest

from diffjax.errors import UserError
from diffjax.evaluation.sweep_table import sweep_table
from diffjax.sweeps import Sweep
from experiments import cli, config_files, sweep
from experiments.sweep_cells import refusal

SWEEP = """
from diffjax.sweeps import Sweep

def get_sweep():
    tiny = {"config.num_steps": 2, "config.batch_size": 16, "config.model.hidden_size": 16,
            "config.model.depth": 1, "config.sampling.num_steps": 2,
            "config.evaluation.num_samples": 20, "config.evaluation.solvers": ("ddim",),
            "config.evaluation.grids": ("uniform", "karras"), "config.evaluation.num_steps": (2,)}
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


def test_seeds_end_in_a_verdict():
    cells = Sweep("c.py", {"objective": ("a", "b"), "config.seed": (0, 1, 2)}).cells()
    values = {"a": (0.5, 0.61, 0.55), "b": (0.91, 1.0, 0.95)}
    results = {
        cell.name: {"frechet_distance": {"value": values[cell.arm][cell.axes["config.seed"]]}}
        for cell in cells
    }
    said = sweep.verdict(cells, results)
    assert "Fréchet distance of each run's own recipe, by seeds:" in said
    assert "| b | 0.953 (0.841 to 1.07) | 0.400 (0.375 to 0.425) | worse |" in said
    # An arm without all its seeds is left out, and one arm alone is no comparison.
    assert sweep.verdict(cells, {**results, "b-seed=1": None}) == ""
    assert sweep.verdict(cells[::3], results) == ""


def test_every_cell_of_the_sweeps_here_fits_together():
    for cell in config_files.returned_by(
        "configs/sweeps/digits_objectives.py", "get_sweep", Sweep
    ).cells():
        assert refusal(cell) is None, cell.name


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
    head, _, row = table.splitlines()
    heads = [cell.strip() for cell in head.strip("|").split("|")]
    assert heads == [
        "run",
        "accuracy",
        "ddim, karras, NFE 4",
        "ddim, uniform, NFE 4",
        "heun, uniform, NFE 6",
    ]
    result = json.loads((folder / "flow" / "evaluation.json").read_text())
    assert sweep_table({"flow": result}) == table
    assert row.split("|")[-2].strip() == f"{result['frechet_distance']['value']:#.3g}"
    # A cell that can't go on is named; nothing of it is lost.
    (folder / "flow" / "config.json").write_text("{}")
    assert run(f"--sweep={file}", f"--workdir={folder}") == 2
    assert "failed: flow" in capsys.readouterr().err
    assert "holds a run with another config" in (folder / "flow" / "output.txt").read_text()


def made(value=0.5, **facts):
    row = {"solver": "heun", "grid": "uniform", "nfe": 34, "frechet_distance": value}
    provenance = {"extractor": "classifier:digits", "num_samples": 1000, "num_floor_images": 359}
    return {
        "frechet_distance": {"value": value, "provenance": provenance | facts},
        "by_nfe": [row],
    }


def test_runs_of_like_provenance_stand_side_by_side():
    # A floor of other images changes no value.
    table = sweep_table({"a": made(0.5), "b": made(0.7, num_floor_images=10)})
    assert [line.split("|")[-2].strip() for line in table.splitlines()[2:]] == ["0.500", "0.700"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (made(num_samples=50), "of a and c can't be compared: num_samples is 1000 and 50"),
        (
            made(extractor_sha256="3081c58fc0e2" + "0" * 52),
            "extractor_sha256 is not stated and 3081c58fc0e2…",
        ),
        (
            made(extractor="pixels:8x8", k=3),
            "extractor is .* and pixels:8x8; k is not stated and 3",
        ),
        ({"frechet_distance": 0.5, "by_nfe": []}, "of c can't be compared, for nothing says"),
    ],
)
def test_runs_of_unlike_provenance_are_refused(other, message):
    with pytest.raises(UserError, match=message) as caught:
        sweep_table({"a": made(), "b": made(), "c": other})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "defines no get_sweep()"), ("def get_sweep(): return 3", "returns int, no Sweep")],
)
def test_what_is_no_sweep_is_refused(file, content, message, capsys):
    file.write_text(content)
    assert run(f"--sweep={file}") == 2
    assert message in capsys.readouterr().err
