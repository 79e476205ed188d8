"""Several text encoders as one, as published models combine them.

SDXL     AlongFeatures((clip_l, clip_bigg), pooled=(1,))
SD 3     AlongTokens((AlongFeatures((clip_l, clip_bigg), pooled=(0, 1)), t5))
Flux     PooledFrom(t5, clip_l)
SD 3 without T5 has `Zeros` in its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffjax.conditions import TokenStates
from diffjax.errors import UserError
from diffjax.text.encoders import Sizes


@dataclass(frozen=True)
class AlongFeatures:
    """The states of several encoders, concatenated for each token.

    Encoders have texts of equal lengths, and the mask is that of the first one.

    Attributes:
        encoders: two or more.
        pooled: the numbers of those whose pooled vectors are concatenated; `(1,)` in SDXL, `(0, 1)`
            in SD 3.
    """

    encoders: tuple[Any, ...]
    pooled: tuple[int, ...]

    def __post_init__(self) -> None:
        if not set(self.pooled) <= set(range(len(self.encoders))):
            raise UserError(
                f"pooled={self.pooled}: encoders are counted from 0 to {len(self.encoders) - 1}"
            )

    @property
    def sizes(self) -> Sizes:
        """The sizes of what it returns."""
        each = [encoder.sizes for encoder in self.encoders]
        if len(lengths := {sizes.length for sizes in each}) != 1:
            raise UserError(f"encoders along features have texts of one length, not {lengths}")
        width = sum(sizes.width for sizes in each)
        return Sizes(each[0].length, width, sum(each[i].pooled_width for i in self.pooled))

    def __call__(self, texts: Sequence[str]) -> TokenStates:
        each = [encoder(texts) for encoder in self.encoders]
        states = np.concatenate([states.states for states in each], -1)
        pooled = _joined([each[i].pooled for i in self.pooled], len(texts))
        return TokenStates._make((states, each[0].mask, pooled))


@dataclass(frozen=True)
class AlongTokens:
    """The tokens of several encoders, one after the other.

    Narrower states are filled up with zeros. Pooled vectors are concatenated.

    Attributes:
        encoders: two or more.
    """

    encoders: tuple[Any, ...]

    @property
    def sizes(self) -> Sizes:
        """The sizes of what it returns."""
        lengths, widths, pooled = zip(*(encoder.sizes for encoder in self.encoders), strict=True)
        return Sizes(sum(lengths), max(widths), sum(pooled))

    def __call__(self, texts: Sequence[str]) -> TokenStates:
        each, width = [encoder(texts) for encoder in self.encoders], self.sizes.width
        filled = [
            np.pad(states.states, ((0, 0), (0, 0), (0, width - states.states.shape[-1])))
            for states in each
        ]
        masks, pooled = ([getattr(x, name) for x in each] for name in ("mask", "pooled"))
        return TokenStates._make(
            (np.concatenate(filled, 1), np.concatenate(masks, 1), _joined(pooled, len(texts)))
        )


@dataclass(frozen=True)
class PooledFrom:
    """The states of one encoder, and the pooled vector of another.

    Attributes:
        states: whose states and mask are returned.
        pooled: whose pooled vector is returned.
    """

    states: Any
    pooled: Any

    @property
    def sizes(self) -> Sizes:
        """The sizes of what it returns."""
        return self.states.sizes._replace(pooled_width=self.pooled.sizes.pooled_width)

    def __call__(self, texts: Sequence[str]) -> TokenStates:
        return self.states(texts)._replace(pooled=self.pooled(texts).pooled)


@dataclass(frozen=True)
class Zeros:
    """States of zeros, in the place of an encoder that a model is used without.

    Attributes:
        sizes: the sizes of what it returns.
    """

    sizes: Sizes

    def __call__(self, texts: Sequence[str]) -> TokenStates:
        count, (length, width, pooled_width) = len(texts), self.sizes
        states = np.zeros((count, length, width), np.float32)
        return TokenStates._make(
            (states, np.ones((count, length), bool), np.zeros((count, pooled_width), np.float32))
        )


def _joined(pooled: Sequence[Any], count: int) -> np.ndarray:
    return np.concatenate([np.zeros((count, 0), np.float32), *pooled], -1)
