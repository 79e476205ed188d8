"""Several conditions together, each part by its name."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from diffjax.conditions.base import Condition, Rate, Shapes, len_of
from diffjax.errors import UserError, nearest
from diffjax.shapes import Keys, OneKey

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
        main: the name of the part that a text without names is of, such as a prompt; "" if a text
            has to name its parts.

    Example:
        >>> from diffjax.conditions import Classes, Images
        >>> both = Several({"digit": Classes(10), "coarse": Images((8, 8, 1))})
        >>> jax.tree.map(lambda leaf: leaf.shape, both.null(2))
        {'coarse': (2, 8, 8, 1), 'digit': (2,)}
    """

    parts: Mapping[str, Condition]
    kept: tuple[str, ...] = ()
    main: str = ""

    def __post_init__(self) -> None:
        for name in self.kept:
            if name not in self.parts:
                raise UserError(f"kept={self.kept}: no part {name!r}; {nearest(name, self.parts)}")
        if self.main and self.main not in self.parts:
            raise UserError(f"main: no part {self.main!r}; {nearest(self.main, self.parts)}")
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
        """Refuses rates of unknown parts, or of parts that are never dropped.

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
        classes = max(arguments.get("num_classes", 0) for arguments in each)
        together = {name: value for arguments in each for name, value in arguments.items()}
        return together | {"num_classes": classes}

    def shapes(self, n: Any) -> Shapes:
        return {name: rows for p in self.parts.values() for name, rows in p.shapes(n).items()}

    def of_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: part.of_batch(batch) for name, part in self.parts.items()}

    def abstract(self, n: Any) -> dict[str, Any]:
        return {name: part.abstract(n) for name, part in self.parts.items()}

    @property
    def takes_level(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(part.takes_level for part in self.parts.values())

    def augmented(self, key: OneKey, cond: Any) -> dict[str, Any]:
        return {
            name: part.augmented(jax.random.fold_in(key, i), cond[name])
            for i, (name, part) in enumerate(self.parts.items())
        }

    def at_level(self, keys: Keys, cond: Any, level: Any) -> dict[str, Any]:
        return {name: part.at_level(keys, cond[name], level) for name, part in self.parts.items()}

    def check_level(self, level: float) -> None:
        if not self.takes_level:
            super().check_level(level)
        for part in self.parts.values():
            if part.takes_level:
                part.check_level(level)

    def array_names(self) -> dict[str, Any]:
        return {name: part.array_names() for name, part in self.parts.items()}

    def null(self, n: Any) -> dict[str, Any]:
        return {name: part.null(n) for name, part in self.parts.items()}

    def nulled(self, cond: Any) -> dict[str, Any]:
        others = {n: part.nulled(cond[n]) for n, part in self.parts.items() if n not in self.kept}
        return self.replaced(cond, others)

    @property
    def negative(self) -> "Several":
        """The condition without the kept parts, which a negative condition does not have."""
        others = {name: part for name, part in self.parts.items() if name not in self.kept}
        return Several(others, main=self.main if self.main in others else "")

    def replaced(self, cond: Any, negative: Any) -> dict[str, Any]:
        kept = {name: self.parts[name].kept_in_negative(cond[name]) for name in self.kept}
        return {**cond, **kept, **negative}

    def drop(self, key: OneKey, cond: Any, rate: Rate) -> dict[str, Any]:
        rates = rate if isinstance(rate, Mapping) else dict.fromkeys(self._dropped, rate)
        *keys, together = jax.random.split(key, len(self.parts) + 1)
        parts = {
            name: part.drop(part_key, cond[name], rates[name]) if name in rates else cond[name]
            for part_key, (name, part) in zip(keys, self.parts.items(), strict=True)
        }
        return super().drop(together, parts, rates[ALL]) if ALL in rates else parts

    def of(self, given: Any) -> Any:
        """As `Condition.of`; a dict has an argument of `of` for each part.

        Parts that training can drop, or that have usual values, may be missing; they are null.

        Raises:
            UserError: there is no such part, one is missing, or they have unlike numbers of rows.
        """
        if not isinstance(given, Mapping):
            return super().of(given)
        self._check_names(given)
        if not given:
            raise UserError("an empty dict has no part of the condition: name at least one")
        found = {name: self.parts[name].of(rows) for name, rows in given.items()}
        n = max(map(len_of, found.values()))
        missing = {name: part.null(n) for name, part in self.parts.items() if name not in found}
        return super().of(missing | found)

    def parse(self, given: Sequence[Any] | np.ndarray) -> dict[str, Any]:
        """Rows such as `"digit=3;prompt=a red apple"`, or dicts as `{"digit": 3}`, part by part.

        Each part parses its own texts. A text with a semicolon stands in double quotes. A text that
        begins with no part's name is of the part `main`. Parts that training can drop, or that have
        usual values, may be missing in a row; they are null there.

        Raises:
            UserError: the first row that has another form, an unknown part, or a part too few.
        """
        rows = [row if isinstance(row, Mapping) else self._row(str(row)) for row in given]
        for row in rows:
            self._check_names(row)
        return {name: self._column(name, rows) for name in self.parts}

    def _row(self, text: str) -> dict[str, str]:
        first = text.partition("=")[0].strip()
        if self.main and first not in self.parts:
            return {self.main: text}
        return _fields(text, self.parts)

    def _column(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Any:
        """One part of all rows, null where it is missing."""
        part = self.parts[name]
        there = [name in row for row in rows]
        null = part.null(1)
        if not any(there):
            return jax.tree.map(np.asarray, part.null(len(rows)))
        parsed = part.parse([row[name] for row in rows if name in row])
        both = jax.tree.map(lambda *leaves: np.concatenate(leaves), null, parsed)
        return part.take(both, np.where(there, np.cumsum(there), 0))

    def _check_names(self, given: Mapping[str, Any]) -> None:
        for name in given:
            if name not in self.parts:
                raise UserError(
                    f"no part of the condition is called {name!r}; {nearest(name, self.parts)}"
                )
        needed = [n for n, p in self.parts.items() if n not in self._dropped and not p.has_usual]
        missing = [n for n in needed if n not in given]
        if missing:
            raise UserError(
                f"the part {missing[0]!r} of the condition ({self.parts[missing[0]].describe()}) "
                f"is missing in {_short(given)}, and this network never goes without it"
            )

    def pictures(self, cond: Any) -> np.ndarray | None:
        each = (part.pictures(cond[name]) for name, part in self.parts.items())
        return next((images for images in each if images is not None), None)

    def titles(self, cond: Any) -> list[str] | None:
        each = [part.titles(cond[name]) for name, part in self.parts.items()]
        shown = [titles for titles in each if titles is not None]
        return [", ".join(filter(None, row)) for row in zip(*shown, strict=True)] or None

    def check(self, cond: Any) -> None:
        super().check(cond)
        for name, part in self.parts.items():
            part.check(cond[name])

    def release(self) -> None:
        for part in self.parts.values():
            part.release()

    def describe(self) -> str:
        return ", ".join(f"{name}: {part.describe()}" for name, part in self.parts.items())


_FIELD = re.compile(r'\s*([^=;"]+?)\s*=\s*(?:"([^"]*)"|([^;"]*?|[^;"][^;]*?))\s*(?:;|$)')


def _fields(row: str, parts: Mapping[str, Condition]) -> dict[str, str]:
    """The texts of a row by part.

    Example:
        >>> _fields('digit=3; prompt="red; ripe"', {})
        {'digit': '3', 'prompt': 'red; ripe'}
    """
    found, place = {}, 0
    while place < len(row):
        field = _FIELD.match(row, place)
        if field is None or field[1] in found:
            form = ";".join(f"{name}=…" for name in parts)
            raise UserError(
                f"{row!r} is to name the parts of the condition, each once: {form}; a text with a "
                "semicolon in double quotes"
            )
        found[field[1]] = field[3] if field[2] is None else field[2]
        place = field.end()
    return found


def _short(given: Mapping[str, Any]) -> str:
    """The parts that are there, for an error."""
    return ", ".join(map(str, given)) or "an empty one"
