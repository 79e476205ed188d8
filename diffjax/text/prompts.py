"""Prompts: texts as a kind of condition, with the encoder that reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.conditions import Tokens, TokenStates
from diffjax.errors import UserError
from diffjax.text.encoders import Encodes


@dataclass(frozen=True)
class Prompts(Tokens):
    """Token states of texts; `prompts` makes one for an encoder.

    Attributes:
        encoder: what reads texts; None where all states come ready, from files.
        unconditional: the condition of one example that is the null condition, such as the empty
            text; None for no token and zeros.
    """

    name: str = "text"
    encoder: Encodes | None = None
    unconditional: TokenStates | None = field(default=None, compare=False, repr=False)

    def null(self, n: Any) -> TokenStates:
        if self.unconditional is None:
            return super().null(n)
        parts = (jnp.asarray(part) for part in self.unconditional)
        return TokenStates(*(jnp.broadcast_to(part, (n, *part.shape[1:])) for part in parts))

    def parse(self, given: Sequence[Any] | np.ndarray) -> TokenStates:
        if self.encoder is None:
            raise UserError(
                f"the prompt {given[0]!r} needs a text encoder, and this condition has none: pass "
                "one, or ready states"
            )
        return self.encoder([text if isinstance(text, str) else _refused(text) for text in given])


def prompts(encoder: Encodes, null: str | None = "", name: str = "text") -> Prompts:
    """The condition of texts that an encoder reads.

    Its `parse` takes the texts of `run.sample(["a red apple"])`, `--labels="a red apple"`,
    `--labels=@prompts.txt` (UTF-8, a text in each line) and `against=["blurry"]`, one negative text
    for all samples or one for each.

    Args:
        encoder: a `TextEncoder`, or a combination of them.
        null: the text of the null condition, to which training drops texts and which guidance
            goes away from; "" in Stable Diffusion. None: no token, and zeros.
        name: of its arrays in a batch.

    Example:
        `prompts(read_text_encoder("MiniLM"), null=None)`
    """
    unconditional = None if null is None else jax.tree.map(np.asarray, encoder([null]))
    return Prompts(*encoder.sizes, name, encoder, unconditional)


def _refused(given: Any) -> str:
    raise UserError(f"a prompt is a text, and {given!r} is none: put it in quotes")
