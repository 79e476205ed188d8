"""Token states: sequences of vectors of any length, such as what a text encoder returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from diffjax.conditions.base import Condition, Shapes
from diffjax.kinds import NotNegative, Positive


class TokenStates(NamedTuple):
    """The condition of B examples: up to L vectors each.

    Attributes:
        states: `[B, L, D]` float32, one vector per token.
        mask: `[B, L]` bool, true where there is a token; other states have no influence.
        pooled: `[B, P]` float32, one vector for the whole sequence; P may be 0.
    """

    states: Array
    mask: Array
    pooled: Array


@dataclass(frozen=True)
class Tokens(Condition):
    """Token states `[n, length, width]` with a mask, and one pooled vector `[n, pooled_width]`.

    The null condition has no token, and a pooled vector of zeros. A network needs something to
    attend to then: `DiT` has a learned null token in each layer, which is there for every example.
    A kind of text is a subclass with a `parse` (docs/extending.md).

    Attributes:
        length: the largest number of tokens, L; 77 for CLIP's text encoder.
        width: the width of a token's state, D; 768 for CLIP ViT-L.
        pooled_width: the width of the pooled vector, P; 0 for none.
        name: the name of its arrays in a batch: `{name}_states`, `{name}_mask` and `{name}_pooled`.

    Example:
        >>> null = Tokens(length=4, width=8).null(2)
        >>> null.states.shape, bool(null.mask.any()), null.pooled.shape
        ((2, 4, 8), False, (2, 0))
    """

    length: Positive[int]
    width: Positive[int]
    pooled_width: NotNegative[int] = 0
    name: str = "tokens"

    def shapes(self, n: Any) -> Shapes:
        return {
            f"{self.name}_states": jax.ShapeDtypeStruct((n, self.length, self.width), jnp.float32),
            f"{self.name}_mask": jax.ShapeDtypeStruct((n, self.length), jnp.bool_),
            f"{self.name}_pooled": jax.ShapeDtypeStruct((n, self.pooled_width), jnp.float32),
        }

    def of_batch(self, batch: Mapping[str, Any]) -> TokenStates:
        return TokenStates(*(batch[f"{self.name}_{part}"] for part in TokenStates._fields))

    def null(self, n: Any) -> TokenStates:
        return self.example(n)  # All zeros: no token.

    def describe(self) -> str:
        pooled = f" and a pooled vector of {self.pooled_width}" if self.pooled_width else ""
        return f"up to {self.length} tokens of width {self.width}{pooled}"
