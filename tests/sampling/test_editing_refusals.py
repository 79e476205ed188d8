"""What an edit can't mean is refused: inversion with fresh noise, more than all of the steps."""

import jax.numpy as jnp
import pytest

from diffjax import lookup
from diffjax.errors import UserError
from diffjax.oracle import analytic
from diffjax.process.paths import Linear
from diffjax.sampling import editing
from diffjax.sampling.grids import Power

DATA = analytic.Gaussian(jnp.zeros(2), jnp.eye(2))
# Those whose steps are a function of where they are, and lead both ways.
ADDS_NOISE = {"ddpm", "ddpm_large", "ddpm_learned", "edm_heun_churn", "dpmpp_2m_sde",
              "dpmpp_3m_sde", "sa", "euler_maruyama", "stochastic_heun", "restart",
              "adaptive_sde"}  # fmt: skip


def predict(x, t):
    return DATA.predict(Linear())(x, jnp.broadcast_to(t, len(x)), None)


@pytest.mark.parametrize("name", [*sorted(ADDS_NOISE), "flow_map"])
def test_inversion_by_a_solver_that_does_not_lead_back_is_refused(name):
    solver, times = lookup.solver_called(name), Power()(Linear(), 4)
    with pytest.raises(UserError, match="use a solver that adds no noise"):
        editing.invert(predict, solver, Linear(), times, jnp.ones((1, 2)))


def test_inversion_by_one_that_leads_back_is_not():
    noise, again = editing.invert(
        predict, lookup.solver_called("ddim"), Linear(), Power()(Linear(), 8), jnp.ones((1, 2))
    )
    assert bool(jnp.isfinite(noise).all())
    assert bool(jnp.isfinite(again).all())


@pytest.mark.parametrize("strength", [1.5, 1.0001, float("inf"), float("nan")])
def test_more_than_all_of_the_steps_is_refused(strength):
    with pytest.raises(UserError, match="is a share of the steps: at most 1"):
        editing.later_times(Power()(Linear(), 10), strength)
