"""What text encoders return: the states of each layer, and a vector for the whole text."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int

from diffjax.errors import UserError
from diffjax.shapes import Array, Tokens

TokenIds = Int[Array, " batch tokens"]
"""`[B, T]`: the numbers of tokens in a vocabulary."""
TokenMask = Bool[Array, " batch tokens"]
"""`[B, T]`: true where there is a token, and not padding."""


class TextStates(NamedTuple):
    """The states of a text encoder of n layers.

    A program that uses one layer computes no norm of the others, once it is compiled.

    Attributes:
        hidden: n + 1 arrays `[B, T, D]`: the embedded tokens, then the states after each layer.
        normed: the same after the final norm, which was trained for the last of them alone.
        pooled: `[B, P]`, one vector for a text; P is 0 where an encoder has none.
    """

    hidden: tuple[Tokens, ...]
    normed: tuple[Tokens, ...]
    pooled: Float[Array, " batch pooled"]


def check_length(tokens: int, most: int) -> None:
    """Refuses texts that are longer than the positions of an encoder.

    Raises:
        UserError: they are.
    """
    if tokens > most:
        raise UserError(f"a text has {tokens} tokens, and this encoder reads {most}")
