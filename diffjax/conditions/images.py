"""Images that the network sees beside the noisy one, in further channels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from diffjax.conditions.base import Condition, Shapes


@dataclass(frozen=True)
class Images(Condition):
    """Images `[n, H, W, C]` in [-1, 1], concatenated with the network's input in the channels.

    For super-resolution the coarse image in the fine one's size, for inpainting the image with its
    gaps. Height and width are those of the data. The null condition is an image of zeros. Saharia
    et al. 2021 (arXiv:2104.07636).

    Attributes:
        shape: `(H, W, C)`.
        name: of its array in a batch.

    Example:
        >>> Images((8, 8, 3)).null(2).shape
        (2, 8, 8, 3)
    """

    shape: tuple[int, int, int]
    name: str = "given_image"

    def shapes(self, n: Any) -> Shapes:
        return {self.name: jax.ShapeDtypeStruct((n, *self.shape), jnp.float32)}

    def of_batch(self, batch: Mapping[str, Any]) -> Array:
        return batch[self.name]

    def null(self, n: Any) -> Array:
        return self.example(n)

    def arrays(self, cond: Any) -> dict[str, Any]:
        return {self.name: cond}

    def describe(self) -> str:
        return f"images of {'×'.join(map(str, self.shape))}"
