"""Names are looked up though there is nothing to draw by them."""

import pytest

from diffjax.errors import UserError
from diffjax.runs.measuring.measure import Wanted, wanted_recipes
from experiments import evaluate
from experiments.flags import cli
from tests.support.old_runs import OLD_RUN


@pytest.fixture(scope="module")
def run(old_run):
    return old_run


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"solvers": ["dim"], "num_steps": []}, "no solver is called 'dim'; did you mean 'ddim'"),
        ({"solvers": [], "grids": ["karas"]}, "no grid is called 'karas'; did you mean 'karras'"),
        ({"solvers": ["heun"], "num_steps": [], "grids": ["karas"]}, "no grid is called 'karas'"),
    ],
)
def test_a_misspelt_name_is_refused(run, how, said):
    with pytest.raises(UserError, match=said):
        wanted_recipes(run, Wanted(**how))


def test_names_that_are_right_add_no_row(run):
    wanted = Wanted(solvers=["ddim"], num_steps=[], grids=["karras", "found"])
    _, others = wanted_recipes(run, wanted)
    assert len(others) == 1


def test_the_command_ends_with_status_2(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "make_writable", lambda workdir: None)
    argv = [f"--workdir={OLD_RUN}", "--solvers=dim", "--num_steps="]
    assert cli.run(evaluate.main, evaluate.FLAGS, usage="", argv=argv) == 2
    assert "no solver is called 'dim'" in capsys.readouterr().err
