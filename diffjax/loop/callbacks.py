"""Functions of one's own that `diffjax.train(callbacks=…)` calls with each line of the metrics."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import SupportsFloat

from diffjax.errors import UserError
from diffjax.loop.logging import Writer
from diffjax.runs.load import Run

Callback = Callable[[int, Run, Mapping[str, float]], Mapping[str, SupportsFloat] | None]
"""`(step, run, numbers) -> further numbers of the step, or None`."""


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuses what can't be called with a step, a run and numbers.

    Raises:
        UserError: the first of them.

    Example:
        >>> check_callbacks([lambda step, run, numbers: print(step, numbers["loss"])])
        >>> check_callbacks([print, lambda step: None])
        Traceback (most recent call last):
        ...
        diffjax.errors.UserError: callbacks[1] is called as callback(step, run, numbers): it takes \
other arguments
    """
    if callable(callbacks):
        name = getattr(callbacks, "__name__", "function")
        raise UserError(
            f"callbacks={name} is a function: give a tuple of them, callbacks=({name},)"
        )
    if not isinstance(callbacks, Sequence):
        raise UserError(f"callbacks={callbacks!r}: it is a tuple of functions (step, run, numbers)")
    for place, callback in enumerate(callbacks):
        if not callable(callback):
            raise UserError(f"callbacks[{place}]={callback!r} is not a function")
        try:
            inspect.signature(callback).bind(0, None, {})
        except TypeError:
            raise UserError(
                f"callbacks[{place}] is called as callback(step, run, numbers): it takes other "
                "arguments"
            ) from None
        except ValueError:
            pass  # Builtin functions may have no signature.


class Callbacks:
    """Keeps the lines of a step until its state is at hand, and calls functions with both.

    Args:
        callbacks: the functions.
    """

    def __init__(self, callbacks: Sequence[Callback]):
        self._callbacks = callbacks
        self._lines: dict[int, dict[str, float]] = {}

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def write(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        """Takes numbers, as a `Writer`."""
        if self._callbacks:
            numbers = {name: float(value) for name, value in scalars.items()}
            self._lines.setdefault(step, {}).update(numbers)

    def close(self) -> None:
        """Nothing is open."""

    def due(self, step: int) -> bool:
        """Whether a step has lines that nobody was called with."""
        return step in self._lines

    def call(self, step: int, run: Run, writer: Writer) -> None:
        """Calls all functions with a step's numbers, and writes the numbers that they return.

        Raises:
            UserError: one returned something else.
        """
        numbers = self._lines.pop(step)
        for callback in self._callbacks:
            found = callback(step, run, dict(numbers))
            if found is None:
                continue
            try:
                named = {str(name): float(value) for name, value in found.items()}
            except (AttributeError, TypeError, ValueError):
                name = getattr(callback, "__name__", "a callback")
                raise UserError(
                    f"{name} returned {found!r} at step {step}: a callback returns None, or "
                    'numbers by name, as {"mine/number": 0.5}'
                ) from None
            if named:
                writer.write(step, named)
