"""Several conditions together, each part by its name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from diffjax.conditions.base import Condition, Rate, Shapes
from diffjax.errors import UserError, nearest
from diffjax.shapes import OneKey

ALL = "all"
"""In rates by part: that of dropping all parts together."""


@dataclass(frozen=True)
class Several(Condition):
    """Parts that are conditions themselves; the arrays are a dict with the parts' names.

    Training drops each part independently of the others, at one rate or, with a dict, each at its
    own: `{"text": 0.05, "coarse": 0.05, "all": 0.05}`, where "all" is the rate of dropping all of
    them together (InstructPix2Pix, Brooks et al. 2023, arXiv:2211.09800, has 0.05 for each), and a
    part without a rate is not dropped alone. The null condition has all parts null.
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
        if ALL in self.parts:
            raise UserError(f"no part of a condition can be called {ALL!r}: that means all parts")

    @property
    def can_be_dropped(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return bool(self._dropped)

    @property
    def _dropped(self) -> list[str]:
        """The names of parts that training can drop."""
        return [n for n, part in self.parts.items() if part.can_be_dropped and n not in self.kept]

    def check_dropout(self, rate: Rate) -> None:
        """Refuses rates of parts that there are not, or that are never dropped.

        Raises:
            UserError: the first of them.
        """
        for name in rate if isinstance(rate, Mapping) else ():
            if name in self.parts and name not in self._dropped:
                raise UserError(f"condition_dropout: the part {name!r} is never dropped")
            if name not in (*self.parts, ALL):
                known = nearest(name, [*self._dropped, ALL])
                raise UserError(f"condition_dropout: there is no part {name!r}; {known}")

    def null_is_trained(self, rate: Rate) -> bool:
        if not isinstance(rate, Mapping):
            return super().null_is_trained(rate)
        apart = all(rate.get(name, 0) > 0 for name in self._dropped)
        return self.can_be_dropped and (apart or rate.get(ALL, 0) > 0)

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

    def drop(self, key: OneKey, cond: Any, rate: Rate) -> dict[str, Any]:
        rates = rate if isinstance(rate, Mapping) else dict.fromkeys(self._dropped, rate)
        *keys, together = jax.random.split(key, len(self.parts) + 1)
        parts = {
            name: part.drop(part_key, cond[name], rates[name]) if name in rates else cond[name]
            for part_key, (name, part) in zip(keys, self.parts.items(), strict=True)
        }
        return super().drop(together, parts, rates[ALL]) if ALL in rates else parts

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
