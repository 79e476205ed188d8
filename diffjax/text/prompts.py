"""Prompts: texts as a kind of condition, with the encoder that reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
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
        encoder: what reads texts (`Encodes`); None where all states come ready, from files.
        null_text: the text of the null condition; None for no token and zeros.
        sha256: that of the encoder whose states a network is trained on, which is checked before
            the first text is encoded; "" checks nothing.
    """

    name: str = "text"
    encoder: Any = None
    null_text: str | None = ""
    sha256: str = ""

    def null(self, n: Any) -> TokenStates:
        if self.null_text is None or self.encoder is None:
            return super().null(n)
        parts = (jnp.asarray(part) for part in self._null)
        return TokenStates(*(jnp.broadcast_to(part, (n, *part.shape[1:])) for part in parts))

    @cached_property
    def _null(self) -> TokenStates:
        # A first use may be within a program that is being traced.
        with jax.ensure_compile_time_eval():
            return self.parse([self.null_text])

    def release(self) -> None:
        if self.encoder is not None:
            _ = self.null_text is None or self._null  # Which training goes on to need.
            self.encoder.release()

    def parse(self, given: Sequence[Any] | np.ndarray) -> TokenStates:
        if self.encoder is None:
            raise UserError(
                f"the prompt {given[0]!r} needs a text encoder, and this condition has none: pass "
                "one, or ready states"
            )
        self._check_encoder()
        return self.encoder([text if isinstance(text, str) else _refused(text) for text in given])

    def _check_encoder(self) -> None:
        """Refuses another encoder than the one of the training.

        Raises:
            UserError: its files or settings are others.
        """
        if self.sha256 and self.sha256 != self.encoder.sha256:
            raise UserError(
                f"the text encoder {described(self.encoder)} has sha256 "
                f"{self.encoder.sha256[:12]}, and the states that this network was trained on are "
                f"of {self.sha256[:12]}: bring its files back"
            )


def described(encoder: Any) -> str:
    """The folders of an encoder, or of a combination of them, for errors.

    Example:
        >>> from diffjax.text import FolderEncoder, PooledFrom
        >>> described(PooledFrom(FolderEncoder("t5"), FolderEncoder("clip")))
        't5, clip'
    """
    if folder := getattr(encoder, "folder", ""):
        return folder
    parts = [x for field in fields(encoder) for x in _as_tuple(getattr(encoder, field.name))]
    return ", ".join(described(part) for part in parts if is_dataclass(part))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def prompts(encoder: Encodes, null: str | None = "", name: str = "text") -> Prompts:
    """The condition of texts that an encoder reads.

    Its `parse` takes the texts of `run.sample(["a red apple"])`, `--labels="a red apple"`,
    `--labels=@prompts.txt` (UTF-8, a text in each line) and `against=["blurry"]`, one negative text
    for all samples or one for each.

    Args:
        encoder: a text encoder from `read_text_encoder`, or a combination of several.
        null: the text of the null condition, to which training drops texts and which guidance
            goes away from; "" in Stable Diffusion. None: no token, and zeros.
        name: the name of its arrays in a batch.

    Example:
        `prompts(read_text_encoder("MiniLM"), null=None)`
    """
    return Prompts(*encoder.sizes, name, encoder, null)


def _refused(given: Any) -> str:
    raise UserError(f"a prompt is a text, and {given!r} is not one: put it in quotes")
