"""A recipe in Python is checked like one on a command line, with the same hints."""

import math
from dataclasses import replace

import pytest

from configs import digits
from diffjax.conditions import of_classes
from diffjax.errors import UserError
from diffjax.sampling.grids import Power
from diffjax.spec import spec
from diffjax.wiring import check_recipe, wire
from tests.support.tiny_network import Tiny


@pytest.fixture(scope="module")
def wired():
    config = digits.get_config()
    config.model, config.sampling.guidance_scale = spec(Tiny), 1.0
    return wire(config, (8, 8, 1), of_classes(0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guidance_scale": math.nan}, "guidance_scale=nan must be finite"),
        ({"guidance_scale": math.inf}, "guidance_scale=inf must be finite"),
        ({"num_steps": 0}, "num_steps=0 must be at least 1"),
        ({"num_steps": 2.5}, "num_steps=2.5 must be a whole number"),
        ({"solver": "heun"}, "solver='heun' must be a Solver"),
        ({"grid": Power(math.nan)}, "times that are not finite"),
    ],
)
def test_a_recipe_that_cannot_be_walked_is_refused(wired, changes, said):
    with pytest.raises(UserError, match=said):
        check_recipe(replace(wired.recipe, **changes), wired)


def test_advice_names_what_every_program_has(wired):
    """`experiments.sample` has no --config, nor has `run.sample`."""
    with pytest.raises(
        UserError, match="has no condition; use guidance_scale=1, or guide against="
    ):
        check_recipe(replace(wired.recipe, guidance_scale=2.0), wired)
