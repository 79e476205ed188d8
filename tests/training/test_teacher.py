"""The weights that an objective learns from are those that the config names."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.conditions import Unconditional
from diffjax.errors import UserError
from diffjax.optimizers.base import Optimizer
from diffjax.training.averages import Averages
from diffjax.training.state import init_state, teacher_name
from diffjax.training.step import StepSettings, make_train_step

LIVE = 5.0


class Teacher:
    """Its loss is the teacher's one parameter, and teaches the live one nothing."""

    def __call__(self, apply, params, teacher_params, key, batch, progress):
        del apply, key, progress
        loss = teacher_params["w"] + 0.0 * params["w"] + jnp.zeros_like(batch["image"])
        return loss, {"log_snr": batch["image"]}

    def update_memory(self, memory, seen):
        del seen
        return memory


def still() -> Optimizer:
    return Optimizer(optax.sgd(0.0), lambda step: jnp.zeros(()))


@pytest.mark.parametrize(
    ("name", "decays", "expected"),
    [
        ("ema", (0.999, 0.99), 3.0),
        ("ema", (0.99, 0.999), 2.0),
        ("ema", (0.999, 0.5, 0.99), 3.0),
        ("ema", (), LIVE),
        ("ema-0.5", (0.999, 0.5), 1.0),
        ("live", (0.999, 0.5), LIVE),
    ],
    ids=str,
)
def test_the_teacher_is_the_average_of_the_name_or_the_first_of_the_users_decays(
    name, decays, expected
):
    """Also after a compiled step, from which a state's averages come back sorted by name."""
    values = {"ema-0.5": 1.0, "ema-0.99": 2.0, "ema-0.999": 3.0}
    objective: Any = Teacher()
    network: Any = None  # this loss asks none
    averages = Averages(decays)
    settings = StepSettings(
        2, Unconditional(), averages=averages, teacher=teacher_name(name, averages)
    )
    step = jax.jit(make_train_step(network, objective, still(), settings))
    state = init_state({"w": jnp.array(LIVE)}, still(), Averages(decays))
    for _ in range(2):
        state = state._replace(ema={name: {"w": jnp.array(values[name])} for name in state.ema})
        batch = {"image": jnp.zeros(4), "label": jnp.zeros(4, jnp.int32)}
        state, metrics = step(state, jax.random.key(0), batch)
        np.testing.assert_array_equal(metrics["loss"], expected)
    if len(decays) > 1 and decays[0] > decays[-1]:
        assert list(state.ema) == sorted(state.ema) != [f"ema-{decay}" for decay in decays]


def test_an_average_that_is_not_kept_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"config.teacher='ema-0.98' is not kept; .*'ema-0.99'"):
        teacher_name("ema-0.98", Averages((0.99,)))
