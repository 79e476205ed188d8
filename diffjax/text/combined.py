"""Several text encoders as one, as published models combine them.

SDXL     AlongFeatures((clip_l, clip_bigg), pooled=(1,))
SD 3     AlongTokens((AlongFeatures((clip_l, clip_bigg), pooled=(0, 1)), t5))
Flux     PooledFrom(t5, clip_l)
SD 3 without T5 has `Zeros` in its place.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from diffjax.conditions import TokenStates
from diffjax.errors import UserError
from diffjax.text.encoders import Sizes


class _Combination:
    """What combinations share; a subclass is a frozen dataclass."""

    def release(self) -> None:
        """Frees the weights; the next text reads them again."""
        values: Any = (getattr(self, field.name) for field in fields(self))  # pyright: ignore
        for value in values:
            for part in value if isinstance(value, tuple) else (value,):
                if hasattr(part, "release"):
                    part.release()


@dataclass(frozen=True)
class AlongFeatures(_Combination):
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

    @property
    def sha256(self) -> str:
        """Hex digest of what states depend on."""
        return _hashed("features", self.encoders, self.pooled)

    def __call__(self, texts: Sequence[str]) -> TokenStates:
        each = [encoder(texts) for encoder in self.encoders]
        states = np.concatenate([states.states for states in each], -1)
        pooled = _joined([each[i].pooled for i in self.pooled], len(texts))
        return TokenStates._make((states, each[0].mask, pooled))


@dataclass(frozen=True)
class AlongTokens(_Combination):
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

    @property
    def sha256(self) -> str:
        """Hex digest of what states depend on."""
        return _hashed("tokens", self.encoders)

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
class PooledFrom(_Combination):
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

    @property
    def sha256(self) -> str:
        """Hex digest of what states depend on."""
        return _hashed("pooled from", (self.states, self.pooled))

    def __call__(self, texts: Sequence[str]) -> TokenStates:
        return self.states(texts)._replace(pooled=self.pooled(texts).pooled)


@dataclass(frozen=True)
class Zeros:
    """States of zeros, in the place of an encoder that a model is used without.

    Attributes:
        sizes: the sizes of what it returns.
    """

    sizes: Sizes

    @property
    def sha256(self) -> str:
        """Hex digest of what states depend on."""
        return _hashed("zeros", (), *self.sizes)

    def release(self) -> None:
        """There is nothing to free."""

    def __call__(self, texts: Sequence[str]) -> TokenStates:
        count, (length, width, pooled_width) = len(texts), self.sizes
        states = np.zeros((count, length, width), np.float32)
        return TokenStates._make(
            (states, np.ones((count, length), bool), np.zeros((count, pooled_width), np.float32))
        )


def _joined(pooled: Sequence[Any], count: int) -> np.ndarray:
    return np.concatenate([np.zeros((count, 0), np.float32), *pooled], -1)


def _hashed(how: str, encoders: Sequence[Any], *further: Any) -> str:
    each = [encoder.sha256 for encoder in encoders]
    return hashlib.sha256(repr((how, each, further)).encode()).hexdigest()
