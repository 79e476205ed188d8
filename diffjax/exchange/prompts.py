"""Texts as a condition: tokenizers and text encoders of a pipeline of diffusers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.conditions import Tokens, TokenStates
from diffjax.errors import UserError
from diffjax.host.processes import to_host
from diffjax.models.clip_text.network import ClipText
from diffjax.models.families import find_published
from diffjax.pretrained.tokenizers import Tokenizer, read_tokenizer

ENCODERS = ("text_encoder", "text_encoder_2")
"""The folders of text encoders, in the order of their states."""


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A tokenizer and a text encoder, which returns the states of one layer.

    Attributes:
        tokenizer: `texts -> ids [n, L]`.
        network: the encoder.
        params: its parameters, on the host; they are on a device while it is evaluated.
        layer: the number of the layer whose states are used, from the end, -1 for the last.
        normed: whether the final norm follows.
        pools: whether its pooled vector is used.
    """

    tokenizer: Tokenizer
    network: ClipText
    params: Any
    layer: int = -1
    normed: bool = True
    pools: bool = False

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """States `[n, L, D]` and pooled vectors `[n, P]`, where P may be 0."""
        states, pooled = self._evaluate(self.params, self.tokenizer(texts))
        return to_host(states), to_host(pooled) if self.pools else np.zeros((len(texts), 0))

    @cached_property
    def _evaluate(self) -> Callable[..., Any]:
        def evaluate(params: Any, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = self.network.apply({"params": params}, ids)
            states = found.normed if self.normed else found.hidden
            return states[self.layer], found.pooled

        return jax.jit(evaluate)

    @property
    def width(self) -> int:
        """The width of its states."""
        return self.network.width

    @property
    def pooled_width(self) -> int:
        """The width of the pooled vectors that are used."""
        return (self.network.num_features or self.width) if self.pools else 0


@dataclass(frozen=True)
class Prompts(Tokens):
    """Texts as the states of text encoders, beside each other.

    All states are attended to, also those after the end of a text, as in Stable Diffusion. The null
    condition is the empty text, or states of zeros.

    Attributes:
        encoders: of the texts.
        zero_null: whether the null condition is zeros, as SDXL was trained.
    """

    encoders: tuple[TextEncoder, ...] = field(default=(), compare=False, repr=False)
    zero_null: bool = False

    def parse(self, given: Sequence[Any] | np.ndarray) -> TokenStates:
        """The states of texts.

        Raises:
            UserError: something is no text.
        """
        texts = [*given]
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"a prompt is a text, not {text!r}")
        unlike = [*dict.fromkeys(texts)]
        parts = [encoder(unlike) for encoder in self.encoders]
        states, pooled = (np.concatenate(each, axis=-1) for each in zip(*parts, strict=True))
        rows = np.array([unlike.index(text) for text in texts])
        return TokenStates(
            states[rows].astype(np.float32),
            np.ones((len(rows), self.length), bool),
            pooled[rows].astype(np.float32),
        )

    @cached_property
    def _null(self) -> TokenStates:
        if self.zero_null:
            zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self.abstract(1))
            return zeros._replace(mask=np.ones_like(zeros.mask))
        with jax.ensure_compile_time_eval():  # also within a program that is traced
            return self.parse([""])

    def null(self, n: Any) -> TokenStates:
        def rows(leaf: np.ndarray) -> jax.Array:
            return jnp.broadcast_to(jnp.asarray(leaf), (n, *leaf.shape[1:]))

        return TokenStates(*map(rows, self._null))

    def example(self, n: int) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.abstract(n))

    def describe(self) -> str:
        return f"texts of up to {self.length} tokens"


def part_of(pipeline: Path, name: str) -> Path:
    """The folder of a part of a pipeline.

    Raises:
        UserError: it is missing.
    """
    if not (pipeline / name).is_dir():
        raise UserError(f"{pipeline} is half a pipeline: the folder {name} is missing")
    return pipeline / name


def prompts_of(pipeline: Path, entries: Mapping[str, Any], pooled_width: int) -> Prompts | None:
    """The condition of texts of a pipeline; None of one without text encoders.

    One encoder is used after its final norm (Stable Diffusion). Where the network takes a pooled
    vector, states are those of the layer before the last, without the norm, and the last encoder
    pools (SDXL).

    Args:
        pipeline: the folder.
        entries: of `model_index.json`.
        pooled_width: of the network's condition.

    Raises:
        UserError: a part is missing, can't be read, or is of another kind.
    """
    named = [name for name in ENCODERS if _is_there(entries.get(name))]
    encoders = []
    for name in named:
        folder = part_of(pipeline, name)
        found = find_published(folder)
        if not isinstance(found.network, ClipText):
            raise UserError(f"{folder} is a {type(found.network).__name__}, and not a text encoder")
        tokenizer = read_tokenizer(pipeline / name.replace("text_encoder", "tokenizer"))
        params = jax.tree.map(np.asarray, found.params())
        last = pooled_width > 0 and name == named[-1]
        how = (-2, False) if pooled_width else (-1, True)
        encoders.append(TextEncoder(tokenizer, found.network, params, *how, pools=last))
    if not encoders:
        return None
    return Prompts(
        length=encoders[0].tokenizer.length,
        width=sum(encoder.width for encoder in encoders),
        pooled_width=sum(encoder.pooled_width for encoder in encoders),
        encoders=tuple(encoders),
        zero_null=bool(entries.get("force_zeros_for_empty_prompt", False)),
    )


def _is_there(entry: Any) -> bool:
    return isinstance(entry, list) and entry[0] is not None
