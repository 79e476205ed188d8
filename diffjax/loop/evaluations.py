"""Calls the evaluators of a run while it trains, writes their metrics, keeps the best checkpoint.

A value is a line of `metrics.jsonl`, `{"step": 400, "eval/samples/frechet_distance": 1.3}`. If
steps are repeated, their values are dropped as all lines are. A run that stopped between two
evaluators of a step resumes with those that have no line yet.
"""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffjax.data import DataSet
from diffjax.errors import UserError, nearest
from diffjax.host.interrupts import Interrupted, stop_at_once
from diffjax.host.processes import of_first
from diffjax.host.progress import progress
from diffjax.host.run_files import read_json, read_metrics
from diffjax.loop.logging import Writer
from diffjax.loop.training import Training
from diffjax.runs import workdirs
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.load import BEST, Run
from diffjax.runs.measuring.evaluators import evaluators_of
from diffjax.runs.parts import Parts
from diffjax.training.state import TrainState

_LOG = logging.getLogger("diffjax")


def check_evaluators(parts: Parts, dataset: DataSet) -> None:
    """Refuses evaluators that could not measure this run, before step 1.

    Raises:
        UserError: one of them can't measure this run, or none returns the metric of
            `config.best_by`.
    """
    run, evaluators = Run(parts, parts.abstract, Path()), evaluators_of(parts.config)
    for name, evaluator in evaluators.items():
        check = getattr(evaluator, "check", None)
        if check is not None:
            try:
                check(run, dataset)
            except UserError as error:
                raise UserError(f"config.evaluators.{name}: {error}") from None
    known = [f"{name}/{metric}" for name, each in evaluators.items() for metric in each.metrics]
    best_by = parts.config.best_by
    if parts.config.patience_evaluations and not best_by:
        raise UserError(
            "config.patience_evaluations ends training where config.best_by becomes no better: "
            "set that too, as in --config.best_by=samples/frechet_distance"
        )
    if best_by and best_by not in known:
        hint = (
            nearest(best_by, known)
            if known
            else "this run has no evaluators: try evaluators=samples"
        )
        raise UserError(f"config.best_by: no evaluator returns {best_by!r}; {hint}")


def evaluations_since_best(values: Sequence[float], sign: float = 1.0) -> int:
    """How many values in a row, at the end, were no better than one before them.

    Args:
        values: in their order; what is not finite is not better.
        sign: 1 where lower is better, -1 where higher is.

    Example:
        >>> evaluations_since_best([5.0, 3.0, 4.0, 3.0]), evaluations_since_best([5.0, 3.0], -1.0)
        (2, 1)
    """
    best, last = math.inf, -1
    for place, value in enumerate(values):
        if math.isfinite(value) and sign * value < best:
            best, last = sign * value, place
    return len(values) - 1 - last


def best_at_checkpoints(steps: Sequence[int], every_steps: int) -> set[int]:
    """The newest of the best states, and those that were the best at the last two checkpoints.

    A run that is rolled back goes on from one of these two, and later states are moved aside.

    Args:
        steps: at which a state was the best so far, in increasing order.
        every_steps: between two checkpoints.

    Example:
        >>> sorted(best_at_checkpoints([100, 250, 300, 420, 480, 490], every_steps=200))
        [100, 300, 490]
    """
    if not steps:
        return set()
    last = steps[-1] // every_steps * every_steps
    until = ([step for step in steps if step <= saved] for saved in (last - every_steps, last))
    return {steps[-1], *(known[-1] for known in until if known)}


class Evaluations:
    """The evaluators of a run that trains, from one step on.

    The best state by `config.best_by` is stored in the folder `best`, beside the latest
    checkpoints; so is the one that was the best at each of the last two of these.

    Args:
        training: the run.
        start_step: the step at which it resumes. Best states without a line up to this step are
            moved aside.
    """

    def __init__(self, training: Training, start_step: int):
        self._training = training
        self._config = training.setup.config
        self._values: dict[int, dict[str, float]] = {}
        self._best: Checkpoints | None = None
        self._sign = 1.0
        if training.evaluators:
            for record in read_metrics(training.workdir / workdirs.METRICS):
                values = {key: value for key, value in record.items() if key.startswith("eval/")}
                if values and record["step"] <= start_step:
                    self._values.setdefault(record["step"], {}).update(values)
        name, _, metric = self._best_by.partition("/")
        if metric:
            self._sign = -1.0 if metric in training.evaluators[name].higher_is_better else 1.0
            self._best = Checkpoints(training.workdir / BEST, keep=None)
            # Of a step that is made again, or measured again: a kill came before its line.
            key, stored = f"eval/{self._best_by}", self._best.steps()
            self._best.leave([step for step in stored if key not in self._values.get(step, {})])
            self._delete_outdone()
            self._record_best()

    @property
    def _best_by(self) -> str:
        return self._config.best_by

    def due(self, step: int) -> list[str]:
        """The names of the evaluators that are due after a step and have no line of it yet."""
        last, known = self._config.num_steps, self._values.get(step, {})
        return [
            name
            for name, evaluator in self._training.evaluators.items()
            if step > 0
            and (step % evaluator.every_steps == 0 or step == last)
            and not all(f"eval/{name}/{metric}" in known for metric in evaluator.metrics)
        ]

    def make(self, state: TrainState, writer: Writer, begun: Callable[[int], Any]) -> None:
        """Measures the state of a step by the evaluators that are due.

        A metric that can't be measured, for example because samples are not finite, is NaN, with a
        warning.

        Args:
            state: after the step.
            writer: receives the values.
            begun: called at each batch with the number of the step.

        Raises:
            Interrupted: the training should stop. Evaluators that have ended have their lines.
        """
        step, training = int(state.step), self._training
        run = Run(training.setup.parts, state, training.workdir)

        stopped = (
            f"stopped while evaluating step {step} of {self._config.num_steps} and saved in "
            f"{training.workdir}; the same command goes on from there"
        )

        def beat(number: int) -> None:
            # Processes agree on a stop by how often each calls `should_stop`.
            if (number > 0 or jax.process_count() == 1) and training.should_stop():
                raise Interrupted(stopped)
            begun(step)

        for name in self.due(step):
            evaluator, why = (
                training.evaluators[name],
                "too few images, or none of that kind",
            )
            found = dict.fromkeys(evaluator.metrics, math.nan)
            try:
                with stop_at_once(stopped), progress(f"measuring step {step} by {name}"):
                    found |= evaluator(run, training.dataset, beat)
            except UserError as error:
                if type(error) is not UserError:  # a full disk, a lost process
                    raise
                why = str(error)
            # Every process stores the best state or none does.
            numbers = of_first(np.array([found[metric] for metric in evaluator.metrics], float))
            metrics = [f"{name}/{metric}" for metric in evaluator.metrics]
            values = dict(zip(metrics, numbers.tolist(), strict=True))
            for metric in [metric for metric, value in values.items() if math.isnan(value)]:
                _LOG.warning("step %d: no %s: %s", step, metric, why)
            if self._best_by in values:
                self._keep_if_best(state, values[self._best_by])
            lines = {f"eval/{metric}": value for metric, value in values.items()}
            self._values.setdefault(step, {}).update(lines)
            writer.write(step, lines)
            self._record_best()

    def out_of_patience(self) -> bool:
        """Whether the last `config.patience_evaluations` values of `config.best_by` were no better.

        It depends on the values alone, so a run that stopped and resumes ends at the same step.
        """
        patience, key = self._config.patience_evaluations, f"eval/{self._best_by}"
        values = [self._values[step].get(key) for step in sorted(self._values)]
        known = [float(value) for value in values if value is not None]
        return bool(patience) and evaluations_since_best(known, self._sign) >= patience

    def close(self) -> None:
        """Waits until the best state is stored."""
        if self._best is not None:
            self._best.close()

    def best(self) -> dict[str, Any] | None:
        """The `metric`, `step` and `value` of the best state; None before the first."""
        key = f"eval/{self._best_by}"
        steps = self._best.steps() if self._best is not None else []
        known = [step for step in steps if key in self._values.get(step, {})]
        if not known:
            return None
        step = known[-1]
        return {"metric": self._best_by, "step": step, "value": self._values[step][key]}

    def _keep_if_best(self, state: TrainState, value: float) -> None:
        """Stores a state that is better, before its line: each line then has its state on disk."""
        best = self.best()
        worse = best is not None and not self._sign * value < self._sign * best["value"]
        if self._best is not None and math.isfinite(value) and not worse:
            self._best.save(int(state.step), state, self._training.meta)
            self._best.wait()
            self._delete_outdone()

    def _delete_outdone(self) -> None:
        """Deletes the states that would not be the best either after a roll-back."""
        if self._best is not None:
            stored = self._best.steps()
            kept = best_at_checkpoints(stored, self._config.checkpoint_every_steps)
            self._best.delete([step for step in stored if step not in kept])

    def _record_best(self) -> None:
        known = (read_json(self._training.workdir / workdirs.RUN) or {}).get("best")
        if self._best is not None and self.best() != known:
            workdirs.record(self._training.workdir, best=self.best())
