"""No condition, and class labels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.conditions.base import Condition, Shapes
from diffjax.errors import UserError, nearest, whole_number
from diffjax.kinds import Positive

_BETWEEN = ", "
"""What separates a class's name from its synonyms."""


@dataclass(frozen=True)
class Unconditional(Condition):
    """No condition: `[n]` zeros, which networks ignore; their length is the number of examples.

    Example:
        >>> Unconditional().in_turn(3).tolist()
        [0, 0, 0]
    """

    can_be_dropped: ClassVar[bool] = False

    def shapes(self, n: Any) -> Shapes:
        del n
        return {}

    def of_batch(self, batch: Mapping[str, Any]) -> Any:
        # Not from the batch: the labels of a data set without classes have no meaning.
        return self.null(len(batch["image"]))

    def null(self, n: Any) -> Any:
        return jnp.zeros(n, jnp.int32)

    def abstract(self, n: Any) -> Any:
        return jax.ShapeDtypeStruct((n,), jnp.int32)

    def drop(self, key: Any, cond: Any, rate: Any) -> Any:
        del key, rate
        return cond

    def parse(self, given: Sequence[Any] | np.ndarray) -> np.ndarray:
        return labels_called(given, 0)

    def of(self, given: Any) -> Any:
        return super().of(_listed(given))

    def in_turn(self, n: int, most: int | None = None) -> np.ndarray:
        del most
        return np.zeros(n, np.int32)

    def of_labels(self, labels: np.ndarray) -> np.ndarray:
        return np.zeros(len(labels), np.int32)

    def arrays(self, cond: Any) -> dict[str, Any]:
        return {"labels": cond}

    def describe(self) -> str:
        return "no classes"


@dataclass(frozen=True)
class Classes(Condition):
    """Class labels, int32 `[n]`, from 0; `num_classes` is the null label.

    Attributes:
        num_classes: the number of classes.
        names: one name per class, perhaps with synonyms after it ("tabby, tabby cat"); empty if
            they have no names.

    Example:
        >>> cats = Classes(2, ("cat", "dog"))
        >>> cats.parse(["dog", "0"]).tolist(), cats.null(2).tolist()
        ([1, 0], [2, 2])
    """

    num_classes: Positive[int]
    names: tuple[str, ...] = ()

    def network_arguments(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes}

    def shapes(self, n: Any) -> Shapes:
        return {"label": jax.ShapeDtypeStruct((n,), jnp.int32)}

    def of_batch(self, batch: Mapping[str, Any]) -> Any:
        return batch["label"]

    def null(self, n: Any) -> Any:
        return jnp.full(n, self.num_classes, jnp.int32)

    def parse(self, given: Sequence[Any] | np.ndarray) -> np.ndarray:
        return labels_called(given, self.num_classes, self.names)

    def of(self, given: Any) -> Any:
        """As `Condition.of`; an array `[n]` is a list of labels."""
        return super().of(_listed(given))

    def in_turn(self, n: int, most: int | None = None) -> np.ndarray:
        return np.arange(n, dtype=np.int32) % min(self.num_classes, most or self.num_classes)

    def of_labels(self, labels: np.ndarray) -> np.ndarray:
        return np.asarray(labels, np.int32)

    def titles(self, cond: Any) -> list[str] | None:
        if not self.names:
            return None
        short = [name.split(_BETWEEN)[0] for name in (*self.names, "")]
        return [short[label] for label in np.asarray(cond).tolist()]

    def arrays(self, cond: Any) -> dict[str, Any]:
        return {"labels": cond}

    def check(self, cond: Any) -> None:
        """Refuses numbers that are neither labels nor the null label.

        A network's table of labels returns NaN for them.

        Raises:
            UserError: the first of them.
        """
        super().check(cond)
        null = self.num_classes
        wrong = [label for label in np.unique(cond).tolist() if not 0 <= label <= null]
        if wrong:
            raise UserError(
                f"there is no label {wrong[0]}: this run has {null}, from 0 to {null - 1}"
            )

    def describe(self) -> str:
        return f"{self.num_classes} classes"


def _listed(given: Any) -> Any:
    """An array `[n]` as a list of labels."""
    is_array = hasattr(given, "shape") and np.ndim(given) == 1
    return np.asarray(given).tolist() if is_array else given


def of_classes(num_classes: int, names: Sequence[str] = ()) -> Condition:
    """`Classes`, or `Unconditional` if the number of classes is 0.

    Example:
        >>> of_classes(0)
        Unconditional()
    """
    return Classes(num_classes, tuple(names)) if num_classes else Unconditional()


def labels_called(
    given: Iterable[int | str], num_classes: int, names: Sequence[str] = ()
) -> np.ndarray:
    """Labels by number or name, int32 `[n]`.

    A number is the label of that number, from 0. A text is the label of the class with that name,
    or else with that first name before its synonyms, or else with that synonym; where no class has
    it, and it is made of digits, of that number.

    Args:
        given: numbers, or texts as a command line has them.
        num_classes: 0 is unconditional, of which 0 alone is a label.
        names: the names of the classes.

    Raises:
        UserError: the first that is no label, or is the name of several classes.

    Example:
        >>> labels_called([0, "0", "7"], 3, ["10", "3", "7"]).tolist()
        [0, 0, 2]
        >>> labels_called(["cat"], 2, ["tabby, cat", "tiger, big cat"]).tolist()
        [0]
    """
    known = _by_name(names)
    classes = max(num_classes, 1)

    def number(label: int | str) -> int:
        found: Any = label
        if isinstance(label, str):
            called = known.get(label, [])
            if len(called) > 1:
                each = ", ".join(f"{i} ({names[i]})" for i in called)
                raise UserError(f"several labels are called {label!r}: {each}; pass the number")
            found = called[0] if called else whole_number(label)
        if found in range(classes):  # NumPy's whole numbers are, 2.5 is not.
            return int(found)
        there = f"this run has {classes}, from 0 to {classes - 1}"
        if num_classes == 0:
            there = "this run has no classes: pass the number of samples alone"
        elif isinstance(label, str) and known and not label.removeprefix("-").isdecimal():
            there = nearest(label, known)
        raise UserError(f"no label is called {label!r}; {there}")

    return np.array([number(label) for label in given], np.int32)


def _by_name(names: Sequence[str]) -> dict[str, list[int]]:
    """The labels that each text is a name of: a whole name before a first one, before a synonym."""
    known: dict[str, list[int]] = {}
    split = [name.split(_BETWEEN) for name in names]
    firsts, others = [each[:1] for each in split], [each[1:] for each in split]
    for texts in ([[name] for name in names], firsts, others):
        found: dict[str, list[int]] = {}
        for label, each in enumerate(texts):
            for text in each:
                found.setdefault(text, []).append(label)
        known = found | known
    return known
