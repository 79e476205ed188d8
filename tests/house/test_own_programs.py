"""What is compiled once for equal calls is not run for unlike ones."""

from dataclasses import make_dataclass

import jax
from jax.tree_util import register_dataclass

from diffjax.compiling import once


def factor(number: int) -> type:
    """A registered class of one field, called to multiply by its number."""
    made = make_dataclass(
        f"Times{number}", ["x"], namespace={"value": lambda self: number * self.x}, frozen=True
    )
    return register_dataclass(made)


@once()
def value_of(one):
    return one.value()


def test_dataclasses_with_as_many_fields_have_programs_of_their_own():
    """JAX 0.10 now and then takes the structure of one for that of another."""
    classes = [factor(number) for number in range(20)]
    found = [float(value_of(kind(jax.numpy.ones(())))) for kind in classes]
    assert found == [float(number) for number in range(20)]
