"""The interface of conditions, by which the rest of the library uses their arrays."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.errors import UserError
from diffjax.shapes import Keys, OneKey

Shapes = dict[str, jax.ShapeDtypeStruct]
Rate = Any
"""The probability with which training drops a condition, perhaps traced; of `Several` also a dict
of such probabilities by part."""


class Condition:
    """A kind of condition; a subclass is a frozen dataclass.

    Below, `cond` is the condition of n examples: any tree of arrays with n rows each.

    Attributes:
        can_be_dropped: whether there is anything that training can replace by the null condition.
        takes_level: whether noise of a level is added to it (`at_level`).
        has_usual: whether a part of `Several` may be left out where it is never dropped: `null`
            returns its usual values then.
    """

    can_be_dropped: ClassVar[bool] = True
    takes_level: ClassVar[bool] = False
    has_usual: ClassVar[bool] = False

    def network_arguments(self) -> dict[str, Any]:
        """The arguments of the network that depend on the condition."""
        return {"num_classes": 0}

    def shapes(self, n: Any) -> Shapes:
        """The arrays that a batch of n examples has for this condition, by name."""
        raise NotImplementedError

    def of_batch(self, batch: Mapping[str, Any]) -> Any:
        """The condition of a batch's examples: its arrays in `shapes`, arranged, not changed."""
        raise NotImplementedError

    def null(self, n: Any) -> Any:
        """The condition of n examples that means "no condition"."""
        raise NotImplementedError

    def nulled(self, cond: Any) -> Any:
        """The condition with all parts null that training can drop, for guidance."""
        return self.null(jax.tree.leaves(cond)[0].shape[0])

    def kept_in_negative(self, cond: Any) -> Any:
        """A part that is never dropped, in the condition that guidance leads away from."""
        return cond

    @property
    def negative(self) -> "Condition":
        """The kind of negative conditions: this one without the parts that are never dropped."""
        return self

    def replaced(self, cond: Any, negative: Any) -> Any:
        """The negative condition, with the parts that are never dropped from `cond`."""
        del cond
        return negative

    def abstract(self, n: Any) -> Any:
        """The condition of n examples as `ShapeDtypeStruct`s; n may be a symbolic dimension."""
        return self.of_batch(self.shapes(n))

    def example(self, n: int) -> Any:
        """Some condition of n examples, for shapes: all zeros."""
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.abstract(n))

    def check_dropout(self, rate: Rate) -> None:
        """Refuses rates for parts that the condition does not have.

        Raises:
            UserError: rates by part, of a condition without parts.
        """
        if isinstance(rate, Mapping):
            raise UserError(
                f"condition_dropout={dict(rate)} has a rate for each part, and this condition "
                f"({self.describe()}) has no parts: set one number"
            )

    def null_is_trained(self, rate: Rate) -> bool:
        """Whether training at this rate of dropping shows the network the null condition."""
        return self.can_be_dropped and rate > 0

    def drop(self, key: OneKey, cond: Any, rate: Rate) -> Any:
        """Replaces the condition of random examples by the null condition, for guidance.

        Each example is dropped independently and as a whole. Ho & Salimans 2022
        (arXiv:2207.12598), algorithm 1.

        Args:
            key: a random key.
            cond: the condition of n examples.
            rate: the probability, in [0, 1]; 0.1 is typical.
        """
        n = jax.tree.leaves(cond)[0].shape[0]
        dropped = jax.random.bernoulli(key, rate, (n,))

        def chosen(null: Array, given: Array) -> Array:
            return jnp.where(jnp.reshape(dropped, (n,) + (1,) * (given.ndim - 1)), null, given)

        return jax.tree.map(chosen, self.nulled(cond), cond)

    def augmented(self, key: OneKey, cond: Any) -> Any:
        """The condition with random noise in it, as training shows it; most kinds have none."""
        del key
        return cond

    def as_trained(self, key: OneKey, cond: Any, rate: Rate) -> Any:
        """The condition as training shows it to the network: `augmented`, then `drop`."""
        return self.drop(key, self.augmented(jax.random.fold_in(key, 1), cond), rate)

    def at_level(self, keys: Keys, cond: Any, level: Any) -> Any:
        """The condition with noise of a level, for sampling.

        Args:
            keys: one for each example.
            cond: without noise.
            level: one number, or one for each example.
        """
        del keys, level
        return cond

    def check_level(self, level: float) -> None:
        """Refuses a level of noise that training does not show.

        Raises:
            UserError: it is out of range, or no noise is added to this kind.
        """
        raise UserError(
            f"level={level:g}: no noise is added to {self.describe()}; it is for networks that "
            "enlarge images"
        )

    def take(self, cond: Any, rows: Any) -> Any:
        """The condition of the examples at `rows`, an integer array of any length."""
        return jax.tree.map(lambda leaf: leaf[rows], cond)

    def parse(self, given: Sequence[Any] | np.ndarray) -> Any:
        """The condition that texts (or numbers) describe, one row for each of them.

        Raises:
            UserError: a text does not describe a condition.
        """
        raise UserError(
            f"a condition of the kind {type(self).__name__} can't be read from texts, such as "
            f"{given[0]!r}: pass its arrays"
        )

    def of(self, given: Any) -> Any:
        """Converts a user's condition: a list for `parse`, or arrays that are a condition already.

        Raises:
            UserError: `parse` can't read it, or the arrays are not such a condition.
        """
        if isinstance(given, list | tuple) and not hasattr(given, "_fields"):
            return self.parse(given) if len(given) else jax.tree.map(np.asarray, self.null(0))
        self.check(given)
        return jax.tree.map(
            lambda leaf, right: np.asarray(leaf, right.dtype), given, self.abstract(len_of(given))
        )

    def in_turn(self, n: int, most: int | None = None) -> Any:
        """n conditions that cycle through all possible ones; None if these can't be listed.

        Args:
            n: the number of conditions.
            most: the largest number of different ones.
        """
        del n, most
        return None

    def of_labels(self, labels: np.ndarray) -> Any:
        """The condition of examples of these classes; None if a class does not determine it.

        Evaluations then take the conditions of test images.
        """
        del labels
        return None

    def pictures(self, cond: Any) -> np.ndarray | None:
        """Images `[n, H, W, C]` in [-1, 1] that show a condition beside its samples, or None."""
        del cond
        return None

    def titles(self, cond: Any) -> list[str] | None:
        """A short text for each example, for pictures; None if there are no such texts."""
        del cond
        return None

    def arrays(self, cond: Any) -> dict[str, Any]:
        """The arrays of a condition by their names, for files of samples."""
        return dict(zip(jax.tree.leaves(self.array_names()), jax.tree.leaves(cond), strict=True))

    def array_names(self) -> Any:
        """The names of the arrays in the place of the arrays: by default those in a batch."""
        return self.of_batch({name: name for name in self.shapes(1)})

    def check(self, cond: Any) -> None:
        """Refuses arrays that are not such a condition.

        Raises:
            UserError: the first that differs, with the shape that is needed.
        """
        n, this = len_of(cond), f"this model is conditioned on {self.describe()}"
        leaves = jax.tree.leaves(cond)
        n = n if all(map(np.ndim, leaves)) else 1
        needed = self.abstract(n)
        if jax.tree.structure(cond) != jax.tree.structure(needed):
            raise UserError(
                f"{this}; its condition has the shapes {_shapes_of(self.abstract(n or 1))}, not "
                f"{_shapes_of(cond)}"
            )
        for leaf, right in zip(leaves, jax.tree.leaves(needed), strict=True):
            if np.shape(leaf) != right.shape:
                raise UserError(
                    f"{this}: {n} samples need an array of shape {right.shape}, not "
                    f"{np.shape(leaf)}"
                )
            kind = np.asarray(leaf).dtype
            if not np.can_cast(kind, right.dtype, "same_kind"):
                raise UserError(f"{this}: an array is of {kind}, and should be of {right.dtype}")
            if not np.isfinite(leaf).all():
                raise UserError(f"{this}: an array has values that are not finite")

    def release(self) -> None:
        """Frees what `parse` has in memory, such as a text encoder; `parse` reads it again."""

    def describe(self) -> str:
        """A short description for reports and errors."""
        raise NotImplementedError


def len_of(cond: Any) -> int:
    """The number of examples in a condition; 0 for a tree without rows."""
    leaves = jax.tree.leaves(cond)
    return len(leaves[0]) if leaves and np.ndim(leaves[0]) else 0


def _shapes_of(tree: Any) -> str:
    """The shapes of a tree's arrays in its own structure, as `{'digit': (2,)}`."""
    shapes = [" ".join(str(np.shape(leaf)).split()) for leaf in jax.tree.leaves(tree)]
    written = repr(jax.tree.structure(tree).unflatten([_Written(text) for text in shapes]))
    return " ".join(written.split()) if shapes else repr(tree)


class _Written(str):
    """A text whose `repr` has no quotes."""

    def __repr__(self) -> str:
        return str(self)
