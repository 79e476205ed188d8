"""What samples are drawn by by default, whatever is joined around the objective."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from configs import digits, digits_mean_flow
from diffjax import choices
from diffjax.errors import UserError
from diffjax.process.precond import Meaning
from diffjax.sampling import solvers
from diffjax.spec import build

OF_TWO_TIMES = {
    "mean_flow",
    "improved_mean_flow",
    "alpha_flow",
    "shortcut",
    "flow_map",
    "flow_map_eulerian",
    "flow_map_progressive",
    "flow_anchored_consistency",
    "flow_anchored_consistency_distillation",
    "inductive_moment_matching",
    "solution_flow",
    "terminal_velocity",
}
JOINED = [*choices.WRAPPERS, "adaptive+uncertainty", "none", "none+uncertainty"]


LOSSES = list(choices.LOSSES)
EACH = {(loss, JOINED[i % len(JOINED)]) for i, loss in enumerate(LOSSES)}
EACH |= set(product(("denoising", "mean_flow"), ("adaptive+uncertainty", "none+uncertainty")))


@pytest.mark.parametrize(
    "crosses",
    [
        pytest.param(EACH, id="each loss"),
        pytest.param(
            list(product(LOSSES, JOINED)), id="all", marks=pytest.mark.thorough(tenth=False)
        ),
    ],
)
def test_the_default_solver_asks_what_the_network_was_trained_on(crosses):
    """One that jumps exactly where the network is about two times, for all that can be joined."""
    found = set()
    for loss, wrappers in crosses:
        try:
            config = digits.get_config(f"loss={loss},wrappers={wrappers}")
        except UserError:
            continue  # wrappers that can't be joined
        solver, about_two = build(config.sampling).solver, loss in OF_TWO_TIMES
        assert (solver.needs is Meaning.AVERAGE_VELOCITY) == about_two, (loss, wrappers)
        assert ("flow_map" in config.evaluation.solvers) == about_two, (loss, wrappers)
        found.add((about_two, "+" in wrappers))
    assert found == {(two, joined) for two in (True, False) for joined in (True, False)}


def test_configs_for_mean_flow_have_their_own_default_too():
    config = digits_mean_flow.get_config("wrappers=uncertainty")
    assert build(config.sampling).solver is solvers.flow_map()
    config = digits_mean_flow.get_config("objective=flow")
    assert build(config.sampling).solver is solvers.heun()


def test_mean_flow_with_uncertainty_takes_one_evaluation_a_step():
    """Of 18 steps: 17 and the last one, and not the two a step of Heun's."""
    config = digits.get_config("loss=mean_flow,wrappers=uncertainty")
    config.sampling.num_steps, config.sampling.guidance_scale = 18, 1.0
    recipe = build(config.sampling)
    assert recipe.solver is solvers.flow_map()
    assert recipe.nfe == 18


def test_two_jumps_of_a_consistency_model_are_not_one():
    """The second begins where noise is left: 80/2⁷ on EDM's path above the least, 0.002."""
    config = digits.get_config("objective=ict")
    recipe, path = build(config.sampling), build(config.path)
    times = replace(recipe, num_steps=2).times(path)
    np.testing.assert_allclose(times, [80.0, 0.002 + 79.998 / 2**7, 0.0], rtol=1e-5)
    assert build(digits.get_config("objective=edm").sampling).grid == build(choices.GRIDS["karras"])
