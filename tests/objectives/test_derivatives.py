"""Central differences in the place of a derivative in forward mode: their order, their choice."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from diffjax.errors import UserError
from diffjax.objectives.base import Progress
from diffjax.objectives.derivatives import CentralDifference, Exact
from diffjax.objectives.few_step.flow_maps import Eulerian, Lagrangian, SelfDistilled
from diffjax.objectives.few_step.mean_flow import MeanFlow
from diffjax.spec import build
from diffjax.wiring import traits_of
from tests.objectives.few_step.test_flow_maps import BATCH, found, of, smooth_network


def with_derivative(kind, *derivative):
    if kind is MeanFlow:
        parts = {"derivative": derivative[0]} if derivative else {}
        return of(MeanFlow, between=0.7, power=0.0, own_velocity=True, **parts)
    return of(SelfDistilled, between=0.7, rule=kind(*derivative))


def test_the_bias_of_a_derivative_is_of_second_order_in_the_step():
    """Along a direction of both arguments of `x²·t³`."""
    x, t, v = np.float32([0.5, -1.0]), np.float32(0.7), np.float32([1.0, 0.5])

    def function(x, t):
        return x**2 * t**3

    def change(derivative):
        with jax.enable_x64(True):
            primals = tuple(map(jnp.float64, (x, t)))
            value, change = derivative(function, primals, (jnp.float64(v), jnp.float64(1.0)))
        np.testing.assert_allclose(value, function(*primals), rtol=1e-12)
        return np.asarray(change)

    exact = 2 * x * v * t**3 + 3 * x**2 * t**2
    np.testing.assert_allclose(change(Exact()), exact, rtol=1e-6)
    near, far = (change(CentralDifference(h)) - change(Exact()) for h in (0.01, 0.02))
    np.testing.assert_allclose(far / near, 4.0, rtol=0.01)


@pytest.mark.parametrize("kind", [MeanFlow, Lagrangian, Eulerian])
def test_each_loss_takes_the_derivative_that_it_is_given(kind):
    @dataclass(frozen=True)
    class Counted(Exact):
        def __call__(self, function, primals, tangents):
            seen.append(tangents)
            return super().__call__(function, primals, tangents)

    seen: list[Any] = []
    objective = with_derivative(kind, Counted())
    rest = 0.9, jax.random.key(0), BATCH, Progress(jnp.zeros(()), num_steps=1)
    jax.eval_shape(lambda params: objective(smooth_network, params, *rest)[0], 1.3)
    assert len(seen) == 1


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("kind", [MeanFlow, Lagrangian, Eulerian])
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
