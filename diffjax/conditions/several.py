"""Several conditions together, each part by its name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from diffjax.conditions.base import Condition, Shapes
from diffjax.errors import UserError, nearest
from diffjax.shapes import OneKey


@dataclass(frozen=True)
class Several(Condition):
    """Parts that are conditions themselves; the arrays are a dict with the parts' names.

    Each part is dropped independently of the others, and the null condition has all of them null.
    Parts that are always kept, such as the coarse image of super-resolution, are never dropped, and
    guidance leads away from the same condition with the other parts null.

    Attributes:
        parts: the conditions by name, at most one of them `Classes`. Parts of one kind need
            different names of their arrays (`Tokens.name`).
        kept: the names of parts that are never dropped.

    Example:
        >>> from diffjax.conditions import Classes, Images
        >>> both = Several({"digit": Classes(10), "coarse": Images((8, 8, 1))})
        >>> jax.tree.map(lambda leaf: leaf.shape, both.null(2))
        {'coarse': (2, 8, 8, 1), 'digit': (2,)}
    """

    parts: Mapping[str, Condition]
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.kept:
            if name not in self.parts:
                raise UserError(f"kept={self.kept}: no part {name!r}; {nearest(name, self.parts)}")

    @property
    def can_be_dropped(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(p.can_be_dropped for name, p in self.parts.items() if name not in self.kept)

    def network_arguments(self) -> dict[str, Any]:
        each = [part.network_arguments() for part in self.parts.values()]
        return {"num_classes": max(arguments["num_classes"] for arguments in each)}

    def shapes(self, n: Any) -> Shapes:
        return {name: rows for p in self.parts.values() for name, rows in p.shapes(n).items()}

    def of_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: part.of_batch(batch) for name, part in self.parts.items()}

    def abstract(self, n: Any) -> dict[str, Any]:
        return {name: part.abstract(n) for name, part in self.parts.items()}

    def null(self, n: Any) -> dict[str, Any]:
        return {name: part.null(n) for name, part in self.parts.items()}

    def nulled(self, cond: Any) -> dict[str, Any]:
        return {
            name: cond[name] if name in self.kept else part.nulled(cond[name])
            for name, part in self.parts.items()
        }

    def drop(self, key: OneKey, cond: Any, rate: Any) -> dict[str, Any]:
        keys = dict(zip(self.parts, jax.random.split(key, len(self.parts)), strict=True))
        return {
            name: cond[name] if name in self.kept else part.drop(keys[name], cond[name], rate)
            for name, part in self.parts.items()
        }

    def check(self, cond: Any) -> None:
        super().check(cond)
        for name, part in self.parts.items():
            part.check(cond[name])

    def arrays(self, cond: Any) -> dict[str, Any]:
        return {
            array: rows
            for name, part in self.parts.items()
            for array, rows in part.arrays(cond[name]).items()
        }

    def describe(self) -> str:
        return ", ".join(f"{name}: {part.describe()}" for name, part in self.parts.items())
