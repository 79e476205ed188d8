"""Central differences in the place of a derivative in forward mode: their order, their choice."""

import numpy as np
import pytest

from configs import digits
from diffjax.errors import UserError
from diffjax.objectives.derivatives import CentralDifference
from diffjax.objectives.few_step.flow_maps import Eulerian, Lagrangian, SelfDistilled
from diffjax.objectives.few_step.mean_flow import MeanFlow
from diffjax.spec import build
from diffjax.wiring import traits_of
from tests.objectives.test_flow_maps import found, of


def with_derivative(kind, *derivative):
    if kind is MeanFlow:
        parts = {"derivative": derivative[0]} if derivative else {}
        return of(MeanFlow, between=0.7, power=0.0, own_velocity=True, **parts)
    return of(SelfDistilled, between=0.7, rule=kind(*derivative))


@pytest.mark.parametrize(
    "kind",
    [MeanFlow, *(pytest.param(k, marks=pytest.mark.thorough) for k in (Lagrangian, Eulerian))],
)
def test_the_bias_is_of_second_order_in_the_step(kind):
    exact = found(with_derivative(kind))[1]
    near, far = (found(with_derivative(kind, CentralDifference(h)))[1] for h in (0.01, 0.02))
    between = np.abs(far - exact) > 1e-6
    assert between.any()
    ratio = np.linalg.norm(far - exact) / np.linalg.norm(near - exact)
    assert ratio == pytest.approx(4.0, rel=0.02)


@pytest.mark.parametrize("name", ["imf", "flow_map", "scm"])
def test_it_is_chosen_by_name_for_any_loss_with_a_derivative(name):
    config = digits.get_config(f"objective={name},derivative=central")
    assert not traits_of(config).forward_mode
    assert traits_of(digits.get_config(f"objective={name}")).forward_mode
    assert config.name.endswith(f"{name}-central")
    part = config.objective.get("rule", config.objective)
    assert build(part.derivative) == CentralDifference(0.005)


def test_a_loss_without_a_derivative_refuses_the_choice():
    with pytest.raises(UserError, match="derivative=central: the loss Denoising has no derivative"):
        digits.get_config("objective=flow,derivative=central")
    with pytest.raises(UserError, match="derivative"):
        digits.get_config("objective=imf,derivative=centrall")
