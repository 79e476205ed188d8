"""What samples are drawn by by default, whatever is joined around the objective."""

from configs import digits, digits_mean_flow
from diffjax import choices
from diffjax.errors import UserError
from diffjax.sampling import solvers
from diffjax.spec import build
from diffjax.wiring import build_objective

JOINED = [
    *choices.WRAPPERS,
    *(f"mean_flow+{name}" for name in choices.WRAPPERS),
    "adaptive+uncertainty",
    "none",
    "none+mean_flow",
]


def test_the_default_solver_asks_what_the_network_was_trained_on():
    """One that jumps exactly where the network is about two times, for all that can be joined."""
    found = set()
    for wrappers in JOINED:
        config = digits.get_config(f"wrappers={wrappers}")
        try:
            objective = build_objective(config)
        except UserError:
            continue  # wrappers that can't be joined
        solver = build(config.sampling).solver
        assert solver.jumps == objective.flow_map, wrappers
        assert ("flow_map" in config.evaluation.solvers) == objective.flow_map, wrappers
        found.add((solver.jumps, "+" in wrappers))
    assert found == {(jumps, joined) for jumps in (True, False) for joined in (True, False)}


def test_configs_for_mean_flow_have_their_own_default_too():
    config = digits_mean_flow.get_config("wrappers=mean_flow+uncertainty")
    assert build(config.sampling).solver is solvers.flow_map()
    config = digits_mean_flow.get_config("objective=flow")
    assert build(config.sampling).solver is solvers.heun()


def test_mean_flow_with_uncertainty_takes_one_evaluation_a_step():
    """Of 18 steps: 17 and the last one, and not the two a step of Heun's."""
    config = digits.get_config("wrappers=mean_flow+uncertainty")
    config.sampling.num_steps, config.sampling.guidance_scale = 18, 1.0
    recipe = build(config.sampling)
    assert recipe.solver is solvers.flow_map()
    assert recipe.nfe == 18
