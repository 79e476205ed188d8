"""Terms between the examples of a batch, where there is no other example."""

import pytest
from ml_collections import ConfigDict

from configs import digits
from diffjax.conditions import of_classes
from diffjax.errors import UserError
from diffjax.spec import spec
from diffjax.wiring import check_wired, wire
from tests.support.tiny_network import Tiny


def config_of(arguments: str, batch_size: int) -> ConfigDict:
    config = digits.get_config(arguments)
    config.model, config.batch_size = spec(Tiny), batch_size
    return config


@pytest.mark.parametrize(
    ("arguments", "name"),
    [("objective=contrastive", "Contrastive"), ("coupling=entropic_ot", "EntropicTransport")],
)
def test_what_compares_examples_refuses_a_batch_of_one(arguments, name):
    said = f"{name} needs other examples of the batch: batch_size must be at least 2"
    with pytest.raises(UserError, match=said):
        check_wired(wire(config_of(arguments, 1), (8, 8, 1), of_classes(10)), 1, 6)


@pytest.mark.parametrize("arguments", ["objective=contrastive", "objective=flow"])
def test_others_are_wired(arguments):
    """Two examples contrast with one another, and a plain loss needs no other one."""
    batch_size = 2 if "contrastive" in arguments else 1
    wired = wire(config_of(arguments, batch_size), (8, 8, 1), of_classes(10))
    check_wired(wired, batch_size, 6)
