"""What becomes of a step whose loss or gradient is not finite."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from diffjax.errors import UserError
from diffjax.kinds import NotNegative
from diffjax.training.state import TrainState


@dataclass(frozen=True)
class NonFinite:
    """Leaves out up to `skip_in_a_row` such steps one after the other; one more is fatal, or
    rolls the run back.

    A step that is left out changes nothing but the number of steps, and with it the next batch and
    the next noise: parameters, moments, averages and memory stay. How many were left out, in a row
    and in all, is part of the state, so that a resumed run stops where an undisturbed one does.

    A run is rolled back to its newest checkpoint, and continues from there with other data and
    noise (`loop.rollback`). If that fails before the next checkpoint, it goes back one more.

    Args:
        skip_in_a_row: 0 leaves out none, and adds nothing to the program.
        rollbacks: how often a run may be rolled back in all; 0 stops it with its state as it is.

    Raises:
        UserError: a negative number.

    Example:
        >>> NonFinite(3).init().tolist(), NonFinite().init()
        ([0, 0], ())
    """

    skip_in_a_row: NotNegative[int] = 0
    rollbacks: NotNegative[int] = 0

    def __post_init__(self) -> None:
        for name in ("skip_in_a_row", "rollbacks"):
            if getattr(self, name) < 0:
                raise UserError(f"nonfinite.{name}={getattr(self, name)} can't be negative")

    def init(self) -> Any:
        """Steps left out, `[2]` int32: in a row up to now, and in all; nothing if none may be."""
        return jnp.zeros(2, jnp.int32) if self.skip_in_a_row else ()

    def settle(self, old: TrainState, new: TrainState, seen: Any) -> TrainState:
        """The state after a step: `new`, or `old` one step on if `seen` is not all finite.

        Args:
            old: before the step.
            new: after it, its `skipped` still the old one.
            seen: a tree of arrays: loss, gradient, update.
        """
        if not self.skip_in_a_row:
            return new
        # The norm of all of them at once: whatever is not finite makes it so too.
        finite = jnp.isfinite(optax.tree.norm(seen))
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        in_a_row, in_all = old.skipped
        skipped = jnp.stack([jnp.where(finite, 0, in_a_row + 1), in_all + jnp.where(finite, 0, 1)])
        return kept._replace(step=new.step, skipped=skipped)

    def updates_made(self, state: TrainState) -> Array:
        """Steps that were not left out, where the optimizer's schedule is."""
        return state.step - state.skipped[1] if self.skip_in_a_row else state.step

    def metrics(self, state: TrainState) -> dict[str, Array]:
        """Beside the loss: steps left out in a row and in all."""
        if not self.skip_in_a_row:
            return {}
        return {"skipped_in_a_row": state.skipped[0], "skipped": state.skipped[1]}
