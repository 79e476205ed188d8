"""A text-like condition: phrases of words, each of which moves the mean of the images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffjax.conditions import Tokens, TokenStates
from diffjax.data import ArraySource, DataSet, GivenSource
from diffjax.errors import UserError, nearest

WORDS = ("dark", "light", "very", "left")
SHIFTS = np.array([-0.6, 0.6, 0.25, -0.2])  # of the mean, for each word of a phrase
DEVIATION = 0.15
LENGTH = 3


@dataclass(frozen=True)
class Phrases(Tokens):
    """Up to three words, each a one-hot state; the pooled vector is how often each occurs."""

    length: int = LENGTH
    width: int = len(WORDS)
    pooled_width: int = len(WORDS)

    def parse(self, given: Sequence[Any]) -> TokenStates:
        parts = [str(text).split() for text in given]
        for word in (word for words in parts for word in words):
            if word not in WORDS:
                raise UserError(f"no word {word!r}; {nearest(word, WORDS)}")
        numbers = np.full((len(parts), LENGTH), -1)
        for row, words in zip(numbers, parts, strict=True):
            row[: len(words)] = [WORDS.index(word) for word in words[:LENGTH]]
        return states_of(numbers)


def states_of(numbers: np.ndarray) -> TokenStates:
    """Token states of words by number, `[n, LENGTH]`; -1 is no word."""
    mask = numbers >= 0
    states = np.where(mask[..., None], np.eye(len(WORDS))[numbers], 0).astype(np.float32)
    return TokenStates(states, mask, states.sum(1) / LENGTH)


def mean_of(cond: TokenStates) -> np.ndarray:
    """The exact mean of the images with this condition, `[n]`: 0.35 times the sum of shifts."""
    return 0.35 * (np.asarray(cond.states) @ SHIFTS * np.asarray(cond.mask)).sum(1)


def phrases(num_images: int = 4096) -> DataSet:
    """Images `[1, 1, 1]` with phrases of one to three words: `N(mean_of(phrase), 0.15²)`."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, len(WORDS), (num_images, LENGTH))
    numbers[np.arange(LENGTH) >= rng.integers(1, LENGTH + 1, (num_images, 1))] = -1
    cond = states_of(numbers)
    x0 = mean_of(cond) + DEVIATION * rng.normal(size=num_images)
    images = np.clip(np.rint((x0 + 1) * 127.5), 0, 255).astype(np.uint8).reshape(-1, 1, 1, 1)
    kind = Phrases()

    def source(rows: slice) -> GivenSource:
        own = ArraySource(images[rows], np.zeros(len(images[rows]), np.int32))
        return GivenSource(own, {name: part[rows] for name, part in kind.arrays(cond).items()})

    last = num_images // 8
    return DataSet(
        "phrases", source(slice(last, None)), source(slice(last)), (1, 1, 1), 0, (), given=kind
    )
