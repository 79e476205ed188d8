"""Numbers that a network knows an image by, such as the size of its original."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.conditions.base import Condition, Shapes
from diffjax.errors import UserError


@dataclass(frozen=True)
class Numbers(Condition):
    """Numbers `[n, k]` of an example, which a network embeds; they are never dropped.

    SDXL has six: height and width of the original image, the two of the corner where it was
    cropped, and those of the image itself. Podell et al. 2023 (arXiv:2307.01952), section 2.2.

    Attributes:
        names: the names of the k numbers.
        usual: their values where none are chosen.
        name: the name of their array in a batch.
        negative_values: those of some names in the condition that guidance leads away from; else
            they are the same there.

    Example:
        >>> size = Numbers(("height", "width"), (512.0, 512.0))
        >>> size.parse(["512 768", (256, 256)]).tolist()
        [[512.0, 768.0], [256.0, 256.0]]
    """

    names: tuple[str, ...]
    usual: tuple[float, ...]
    name: str = "numbers"
    negative_values: tuple[tuple[str, float], ...] = ()

    can_be_dropped: ClassVar[bool] = False
    has_usual: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(self.names) != len(self.usual) or not self.names:
            raise UserError(f"{len(self.names)} names of numbers need as many values in `usual`")

    def shapes(self, n: Any) -> Shapes:
        return {self.name: jax.ShapeDtypeStruct((n, len(self.names)), jnp.float32)}

    def of_batch(self, batch: Mapping[str, Any]) -> Array:
        return batch[self.name]

    def null(self, n: Any) -> Array:
        return jnp.broadcast_to(jnp.asarray(self.usual, jnp.float32)[None], (n, len(self.usual)))

    def nulled(self, cond: Any) -> Any:
        return cond

    def kept_in_negative(self, cond: Any) -> Any:
        for name, value in self.negative_values:
            cond = jnp.asarray(cond).at[:, self.names.index(name)].set(value)
        return cond

    def drop(self, key: Any, cond: Any, rate: Any) -> Any:
        del key, rate
        return cond

    def parse(self, given: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Rows of k numbers, or texts of them with blanks or commas between.

        Raises:
            UserError: the first row that is something else.
        """
        rows = []
        for row in given:
            parts = re.split(r"[\s,]+", row.strip()) if isinstance(row, str) else row
            try:
                numbers = [float(part) for part in parts]
            except (TypeError, ValueError):
                numbers = []
            if len(numbers) != len(self.names) or not np.isfinite(numbers).all():
                raise UserError(
                    f"{row!r} is not {self.describe()}; usual are {_written(self.usual)}"
                )
            rows.append(numbers)
        return np.asarray(rows, np.float32)

    def describe(self) -> str:
        return f"{len(self.names)} numbers ({', '.join(self.names)})"


def _written(numbers: Sequence[float]) -> str:
    return '"' + " ".join(f"{number:g}" for number in numbers) + '"'
