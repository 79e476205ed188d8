"""Embeddings of images: the condition of networks that make pictures of what a prior makes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffjax.conditions.tokens import Tokens, TokenStates
from diffjax.errors import UserError


@dataclass(frozen=True)
class ImageEmbeddings(Tokens):
    """The embedding of an image by CLIP as the first token, perhaps with those of a text after it.

    The null condition is an embedding of zeros here; `diffjax.exchange.priors` has that of
    unCLIP's models, which is the embedding of a grey picture.

    Attributes:
        embedding_width: the width of an embedding; other tokens may be wider.

    Example:
        >>> kind = ImageEmbeddings(1, 4, embedding_width=4)
        >>> kind.of(np.ones((2, 4), np.float32)).states.shape
        (2, 1, 4)
    """

    name: str = "embedding"
    embedding_width: int = 0

    def of(self, given: Any) -> Any:
        """As `Condition.of`; embeddings `[n, D]` or `[n, 1, 1, D]`, as priors return, are taken."""
        if self.length > 1 or isinstance(given, list | tuple) or np.ndim(given) < 2:
            return super().of(given)
        found = np.asarray(given, np.float32)
        wide = self.embedding_width
        if found.ndim not in (2, 4) or found[..., 0].size != len(found) or found.shape[-1] != wide:
            raise UserError(
                f"this model is conditioned on {self.describe()}, [n, {wide}], not on an array of "
                f"shape {found.shape}"
            )
        states = found.reshape(len(found), 1, wide)
        mask, pooled = np.ones(states.shape[:2], bool), np.zeros((len(found), 0), np.float32)
        return super().of(TokenStates._make((states, mask, pooled)))

    def parse(self, given: Sequence[Any] | np.ndarray) -> TokenStates:
        raise UserError(
            f"the prompt {given[0]!r} needs a prior, which makes the embedding of an image of it: "
            "pass prior=FOLDER (--prior=FOLDER), or embeddings"
        )

    def describe(self) -> str:
        text = f" and {self.length - 1} tokens of a text" if self.length > 1 else ""
        return f"embeddings of images of width {self.embedding_width}{text}"
