"""Continues a run in its folder with a changed config, for example with more steps."""

import logging
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from diffjax.errors import UserError
from diffjax.host.files import write_whole
from diffjax.host.processes import in_first
from diffjax.host.run_files import read_json
from diffjax.optimizers.base import Optimizer
from diffjax.runs import workdirs
from diffjax.runs.changes import Changes, refusal
from diffjax.runs.setup import Setup
from diffjax.spec import build, to_json
from diffjax.training.sharding import spread
from diffjax.training.state import TrainState

_LOG = logging.getLogger("diffjax")
CHANGES = "changes"
"""The key of the list in `run.json`; `Extension.record` writes its entries."""
_JUDGED_BY = ("evaluation", "sampling", "weights")


class Extension(NamedTuple):
    """The changes of a run that continues with another config.

    Attributes:
        changes: old and new value of each changed setting, by its name.
        restart: whether the count of the schedule starts anew.
        before: the optimizer before, as a spec.
        num_steps: before.
    """

    changes: Changes
    restart: bool
    before: Any
    num_steps: int

    def record(self, workdir: Path, setup: Setup, state: TrainState, schedule_start: int) -> None:
        """Writes the new config to the folder, and records and logs the changes.

        Args:
            workdir: the run's folder.
            setup: the new one.
            state: the state from which the run continues.
            schedule_start: updates that had been made when the schedule of the new config began.
        """
        step, updates = int(state.step), int(setup.nonfinite.updates_made(state))
        known = read_changes(workdir)
        changes = {key: list(values) for key, values in self.changes.items()}
        # One that was noted and then killed before its config was written is noted again.
        known = [each for each in known if each["changes"] != changes or each["step"] < step]
        started = known[-1]["schedule_start"] if known else 0
        old = scheduled(self.before, self.num_steps, started)
        new = scheduled(setup.config.optimizer, setup.config.num_steps, schedule_start)
        rates = [np.asarray(each.schedule(updates)).item() for each in (old, new)]
        printed = lines(step, self.changes, self.restart, rates)
        for line in printed:
            _LOG.info("%s", line)
        entry = {
            "step": step,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "lines": printed,
            "changes": changes,
            "schedule": "restart" if self.restart else "continue",
            "schedule_start": schedule_start,
        }
        in_first(lambda: _write(workdir, setup.config, [*known, entry]))


def _write(workdir: Path, config: ConfigDict, entries: list[dict[str, Any]]) -> None:
    # In this order: a config that is new has its entry.
    workdirs.record(workdir, **{CHANGES: entries})
    evaluation = workdir / workdirs.EVALUATION
    judged = any(key.partition(".")[0] in _JUDGED_BY for key in entries[-1]["changes"])
    if judged and evaluation.exists():  # It is measured anew, also where no step is made.
        evaluation.replace(evaluation.with_stem(f"evaluation_{entries[-1]['step']:08d}"))
    write_whole(workdir / workdirs.CONFIG, to_json(config))


def lines(step: int, changes: Changes, restart: bool, rates: Sequence[float]) -> list[str]:
    """The changes after a step as text, one line each.

    Example:
        >>> lines(1200, {"num_steps": (1200, 2400)}, False, (0.0, 0.001))
        ['num_steps: 1200 -> 2400', 'learning rate of step 1201: 0 -> 0.001']
    """
    found = [f"{key}: {there} -> {here}" for key, (there, here) in changes.items()]
    if restart:
        found.append(f"schedule: starts anew at step {step + 1}")
    before, after = rates
    if before != after:
        found.append(f"learning rate of step {step + 1}: {before:g} -> {after:g}")
    return found


def planned(workdir: Path, setup: Setup, how: bool | str) -> Extension | None:
    """The changes of a folder's run with this config; None if nothing differs.

    Args:
        workdir: its folder, which stays as it is.
        setup: the setup of the new config.
        how: `True`, or the new schedule if it depends on `num_steps`: "continue", with the
            schedule of the new length from the step where it stands, or "restart", with a schedule
            over the steps that are left, warm-up included. `False` changes nothing.

    Raises:
        UserError: a change with which a run can't continue, fewer steps than it has made, or a
            schedule that depends on `num_steps` where `how` is neither "continue" nor "restart".
    """
    if how not in (True, False, "continue", "restart"):
        raise UserError(f"extend={how!r}: it is True, 'continue' or 'restart'")
    saved = workdirs.saved_config(workdir) if how else None
    changes = workdirs.changes(saved, setup.config) if saved else {}
    if not saved or not changes:
        return None
    if reason := refusal(changes):
        raise UserError(f"{workdir} can't be extended: {reason}; choose another --workdir")
    config = setup.config
    made = max(workdirs.checkpoint_steps(workdir), default=0)
    if config.num_steps < made:
        raise UserError(
            f"{workdir} can't be extended to num_steps={config.num_steps}: it has made {made} steps"
        )
    before, num_steps = ConfigDict(saved["optimizer"]), saved["num_steps"]
    _check_state(workdir, before, setup)
    if how is True and _depends_on_length(before, num_steps, config.num_steps):
        raise UserError(
            f"the learning rate of {workdir} depends on num_steps: --extend=continue goes on with "
            "the schedule of the new length, --extend=restart begins one over the steps left"
        )
    if how == "restart" and not _counts(setup.abstract.opt_state):
        raise UserError("--extend=restart: this optimizer counts no steps of a schedule")
    return Extension(changes, how == "restart", before, num_steps)


def _check_state(workdir: Path, before: Any, setup: Setup) -> None:
    """Refuses an optimizer whose state has other arrays."""
    params, now = setup.abstract.params, setup.abstract.opt_state
    then = jax.eval_shape(scheduled(before, 1).transform.init, params)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), each) for each in (then, now)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{workdir} can't be extended: the state of config.optimizer has other arrays; choose "
            "another --workdir, with --config.init_from to begin with the weights"
        )


def scheduled(optimizer: Any, num_steps: int, start: int = 0) -> Optimizer:
    """An optimizer whose schedule began when `start` updates had been made; it ends at `num_steps`.

    Its state counts updates since then; its `schedule` takes all updates, as without a restart.
    """
    built: Optimizer = build(
        optimizer, Optimizer, "config.optimizer", num_steps=max(num_steps - start, 1)
    )
    if start == 0:
        return built
    return built._replace(schedule=lambda updates: built.schedule(updates - start))


def _depends_on_length(optimizer: Any, num_steps: int, other: int) -> bool:
    updates = np.unique(np.linspace(0, max(num_steps, other), 1000).astype(int))
    one, two = (scheduled(optimizer, length).schedule for length in (num_steps, other))
    return any(np.asarray(one(n)) != np.asarray(two(n)) for n in updates)


def _is_count(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def _counts(opt_state: Any) -> list[Any]:
    return [node for node in jax.tree.leaves(opt_state, is_leaf=_is_count) if _is_count(node)]


def restarted(state: TrainState) -> TrainState:
    """The same state, with the schedule of its optimizer at its first step."""

    def restart(node: Any) -> Any:
        if not _is_count(node):
            return node
        zero = np.zeros(node.count.shape, node.count.dtype)
        return node._replace(count=spread(zero, node.count.sharding))

    return state._replace(opt_state=jax.tree.map(restart, state.opt_state, is_leaf=_is_count))


def read_changes(workdir: Path) -> list[dict[str, Any]]:
    """All earlier changes of a run, as `Extension.record` wrote them.

    Raises:
        UserError: the file is damaged.
    """
    entries = (read_json(workdir / workdirs.RUN) or {}).get(CHANGES, [])
    known = {"step", "changes", "schedule", "schedule_start"}
    if not isinstance(entries, list) or not all(
        isinstance(each, dict) and known <= each.keys() and type(each["step"]) is int
        for each in entries
    ):
        raise UserError(f"{workdir / workdirs.RUN}: {CHANGES!r} is no list of changes: restore it")
    return entries


def restart_step(workdir: Path) -> float:
    """The step at which the schedule of a run last started anew; -inf if it never did."""
    steps = [each["step"] for each in read_changes(workdir) if each["schedule"] == "restart"]
    return max(steps, default=-math.inf)


def restarts_at(
    restart: float, setup: Setup, state: TrainState, meta: Any
) -> tuple[TrainState, int]:
    """Resets the schedule of a restored state if it restarts; also returns the update it began at.

    Args:
        restart: the step of the last restart. Checkpoints up to it were saved before.
        setup: the setup of the run.
        state: as restored.
        meta: the meta of the checkpoint.
    """
    if meta["step"] <= restart:
        return restarted(state), int(setup.nonfinite.updates_made(state))
    return state, meta.get("schedule_start", 0)
