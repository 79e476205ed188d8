"""Rolls a run back to a good checkpoint when its loss is not finite, and continues otherwise."""

import json
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from jax import Array

from diffjax.errors import UserError
from diffjax.host.files import write_whole
from diffjax.host.processes import in_first
from diffjax.host.run_files import read_json
from diffjax.loop.pending_metrics import NonFiniteLoss
from diffjax.runs.averages import SNAPSHOTS, snapshots_of
from diffjax.runs.checkpoints import Checkpoints

ROLLBACKS = "rollbacks.json"
_LOG = logging.getLogger("diffjax")
# Odd, and so of the full period; far from the small seeds that people choose.
_STRIDE = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Rollbacks:
    """All rollbacks of a run, in time order.

    After rollback n (from 1) the run continues from checkpoint `to` in order n: with data and noise
    of another seed, so that it does not meet the same batch again. Order 0 is the run's own. The
    order of a step depends on this list alone, so a run that stops and resumes repeats it.

    Attributes:
        made: one dict for each: `step` (that was not finite), `to` (the step of the checkpoint),
            `cause` and `when`.

    Example:
        >>> twice = Rollbacks(({"to": 4}, {"to": 2}))
        >>> [twice.order(step) for step in (1, 2, 3, 4, 5)]
        [0, 0, 2, 2, 2]
    """

    made: tuple[dict[str, Any], ...] = ()

    @classmethod
    def read(cls, workdir: Path) -> "Rollbacks":
        """The rollbacks recorded in a run's folder.

        Raises:
            UserError: its file is damaged.
        """
        content = read_json(workdir / ROLLBACKS) or {"rollbacks": []}
        made = content.get("rollbacks")
        if not isinstance(made, list) or not all(
            isinstance(one, dict) and type(one.get("to")) is int for one in made
        ):
            raise UserError(f"{workdir / ROLLBACKS} is no list of rollbacks: restore it")
        return cls(tuple(made))

    def order(self, step: int) -> int:
        """The order of data and noise at step `step`, counted from 1."""
        return max((n for n, one in enumerate(self.made, 1) if one["to"] < step), default=0)

    def key(self, key: Array, step: int) -> Array:
        """The random key of step `step`: the run's own, or in another order one folded from it."""
        order = self.order(step)
        return jax.random.fold_in(key, order) if order else key

    def stretches(self, start_step: int, num_steps: int) -> Iterator[tuple[int, int, int]]:
        """Splits the steps that are left by order: `(order, step before the first, last step)`."""
        borders = sorted({one["to"] for one in self.made if start_step < one["to"] < num_steps})
        for first, last in zip([start_step, *borders], [*borders, num_steps], strict=True):
            yield self.order(first + 1), first, last

    def target(self, saved: list[int]) -> int:
        """The checkpoint to go back to: the newest, or the one before if that one broke again."""
        newest = max(saved)
        tried = self.made[-1]["to"] if self.made else None
        return (
            max((step for step in saved if step < newest), default=newest)
            if (newest == tried)
            else newest
        )


def seed_of(seed: int, order: int) -> int:
    """The seed of an order of the data, `[0, 2⁶⁴)`; that of order 0 is the run's.

    Example:
        >>> seed_of(7, 0), seed_of(7, 1) != seed_of(7, 2)
        (7, True)
    """
    return (seed + order * _STRIDE) % 2**64 if order else seed


def roll_back(
    workdir: Path, checkpoints: Checkpoints, error: NonFiniteLoss, allowed: int
) -> Rollbacks:
    """Goes back to the newest good checkpoint, sets later ones aside and records why.

    Raises:
        NonFiniteLoss: `error`, if no (further) rollback is allowed.
    """
    before = Rollbacks.read(workdir)
    number = len(before.made) + 1
    if number > allowed:
        if allowed:
            raise NonFiniteLoss(
                f"{error}; rolled back {allowed} time(s) already", error.cause, error.step
            )
        raise error
    checkpoints.wait()
    to = before.target(checkpoints.steps())
    checkpoints.leave([step for step in checkpoints.steps() if step > to])
    if (workdir / SNAPSHOTS).is_dir():  # Steps after `to` will be made in another order.
        with closing(snapshots_of(workdir)) as snapshots:
            snapshots.leave([step for step in snapshots.steps() if step > to])
    now = datetime.now(UTC).isoformat(timespec="seconds")
    one = {"step": error.step, "to": to, "cause": error.cause, "when": now}
    after = Rollbacks((*before.made, one))
    text = json.dumps({"rollbacks": after.made}, indent=2) + "\n"
    in_first(lambda: write_whole(workdir / ROLLBACKS, text))
    _LOG.warning(
        "%s: back to step %d, and on from there in another order (%d of at most %d)",
        error.cause,
        to,
        number,
        allowed,
    )
    return after
