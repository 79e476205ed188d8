"""The comparison of solvers from the command line, with two of them and a small network."""

from functools import partial

import pytest

from diffjax import choices
from diffjax.pretrained.family import Size
from diffjax.studies import convergence
from experiments import solvers
from experiments.flags import cli


def run(*arguments):
    return cli.run(solvers.main, solvers.FLAGS, usage=solvers.USAGE, argv=arguments)


@pytest.fixture
def small(monkeypatch):
    few = {name: choices.SOLVERS[name] for name in ("ddim", "heun", "ddpm", "adaptive")}
    monkeypatch.setattr(choices, "SOLVERS", few)
    monkeypatch.setattr(solvers, "BUDGETS", (5, 9))
    few_samples = partial(convergence.convergence, num_samples=16)
    monkeypatch.setattr(convergence, "_NUM_DRAWS", 5_000)
    monkeypatch.setattr(convergence, "convergence", few_samples)
    tiny = Size({"patch_size": 8, "hidden_size": 8, "depth": 1, "num_heads": 1}, 0)
    monkeypatch.setattr(solvers, "SIZES", {"DiT-S/2": tiny})


@pytest.mark.thorough
def test_errors_are_written(small, tmp_path, capsys):
    assert run(f"--out={tmp_path}") == 0
    table = (tmp_path / "convergence.md").read_text()
    assert "| `heun` | 2 | 2 |" in table
    assert "| `ddpm` | 1 (weak) | 1 | 0." in table
    assert "adaptive" not in table
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")
    assert "convergence.md and convergence.png in" in capsys.readouterr().out


@pytest.mark.thorough(tenth=False)
def test_costs_are_written(small, tmp_path, capsys):
    assert run(f"--out={tmp_path}", "--cost", "--batch_size=1") == 0
    lines = (tmp_path / "cost.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["`ddim`", "`heun`", "`ddpm`"]
    assert "cost.md in" in capsys.readouterr().out


def test_what_is_wrong_is_one_line(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")

    def refused(message, *arguments):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err

    refused("did you mean 'linear'", "--out=x", "--path=lineer")
    refused("did you mean 'karras'", "--out=x", "--grid=karas")
    refused("--out is missing")
    monkeypatch.setattr(solvers, "compare", lambda grid, path, named: {"convergence.md": b""})
    refused("can't write into", f"--out={tmp_path / 'file'}")
