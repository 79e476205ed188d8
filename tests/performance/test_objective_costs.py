"""FLOPs of a training step: their table in the docs, and their command."""

import jax.numpy as jnp
import pytest

from diffjax import choices
from diffjax.performance import objective_costs
from diffjax.performance.objective_costs import PLAIN, cost_line, setup_of, training_flops
from diffjax.training.flops import matrix_flops
from experiments import objectives
from experiments.flags import cli
from tests.pages.costs import NAMES, PAGE, table_of

LINES = table_of(PAGE.read_text("utf-8")).splitlines(keepends=True)
AGAIN = "run python -m tests.pages.costs"


def test_the_table_in_the_docs_has_every_objective():
    named = [line.split("`")[1] for line in LINES]
    assert named == [name.removeprefix("objective=") for name in NAMES], AGAIN


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["objective=imf", "objective=shortcut", "objective=cd"])
def test_a_line_is_counted_in_the_compiled_step(name):
    ratio = training_flops(setup_of(name)) / training_flops(setup_of(PLAIN))
    assert cost_line(name, ratio) in LINES, AGAIN


def test_a_step_of_flow_matching_is_three_evaluations(monkeypatch):
    """Forwards, and the gradients of inputs and of weights: but for the first layers' inputs."""
    tiny = choices.copy(choices.MODELS_28X28["dit"])
    tiny.update(hidden_size=8, depth=1, num_heads=1, patch_size=14)
    monkeypatch.setattr(objective_costs.choices, "MODELS_28X28", {"dit": tiny})
    setup = setup_of("objective=flow")
    inputs = (jnp.zeros((16, 28, 28, 1)), jnp.zeros(16), jnp.zeros(16, jnp.int32))
    forwards = matrix_flops(setup.wired.apply, setup.wired.params_shape, *inputs)
    assert 2.0 < training_flops(setup) / forwards < 3.0


def test_the_command_writes_the_ratios(monkeypatch, tmp_path, capsys):
    few = {name: choices.OBJECTIVES[name] for name in ("flow", "cd")}
    monkeypatch.setattr(objectives.choices, "OBJECTIVES", few)
    counts = {"Denoising": 10, "Consistency": 17}
    monkeypatch.setattr(
        objective_costs,
        "training_flops",
        lambda setup: counts[type(setup.wired.objective).__name__],
    )
    arguments = (f"--out={tmp_path}", "--cost")
    assert cli.run(objectives.main, objectives.FLAGS, usage="", argv=arguments) == 0
    table = "| objective | FLOPs of a step |\n|---|---|\n| `flow` | 1.00 |\n| `cd` | 1.70 |\n"
    assert (tmp_path / "cost.md").read_text() == table
    assert table in capsys.readouterr().out
    below = f"--out={tmp_path / 'cost.md' / 'below'}"
    assert cli.run(objectives.main, objectives.FLAGS, usage="", argv=(below, "--cost")) == 2
