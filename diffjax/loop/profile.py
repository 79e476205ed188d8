"""A trace of chosen training steps: what the devices and the host do, and when."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from diffjax.errors import UserError
from diffjax.host.processes import is_first
from diffjax.spec import check_arguments

_LOG = logging.getLogger("diffjax")
FOLDER = "profile"


@dataclass(frozen=True)
class Profile:
    """Which steps are traced.

    Args:
        first: the first of them, from 1; 0 traces none.
        last: the last of them.

    Raises:
        UserError: they are not a range of steps.

    Example:
        >>> Profile(10, 13).first
        10
    """

    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        check_arguments(Profile, first=self.first, last=self.last)
        if self.last < self.first or self.first < 0 or (self.first == 0) != (self.last == 0):
            raise UserError(
                f"profile of steps {self.first}:{self.last}: name the first and the last one, "
                "counted from 1, as 10:13"
            )

    def check(self, num_steps: int) -> None:
        """Refuses steps that a run never makes.

        Raises:
            UserError: the last is beyond the run's end.
        """
        if self.last > num_steps:
            raise UserError(
                f"profile of steps {self.first}:{self.last}: the run ends with step {num_steps}"
            )


@contextmanager
def profiled(
    profile: Profile, workdir: Path, train_step: Callable, step: int
) -> Iterator[Callable]:
    """A train step that writes a trace of the chosen steps to `workdir/profile`.

    The trace begins before the first chosen step and ends when the last one is done; this waits for
    it once. The trace has all that the loop does in between. The first of several processes writes
    it. TensorBoard's profile plugin and Perfetto read it.

    Args:
        profile: which steps.
        workdir: the run's folder.
        train_step: as the loop calls it.
        step: the one before the first call.
    """
    if not profile.first or not is_first():
        yield train_step
        return
    if step >= profile.first:
        _LOG.warning("no trace: step %d of --profile_steps was made before", profile.first)
    running = False

    def stop() -> None:
        nonlocal running
        if running:
            running = False
            jax.profiler.stop_trace()
            _LOG.info("trace of steps %d to %d in %s", profile.first, step, workdir / FOLDER)

    def traced(*arguments: Any) -> Any:
        nonlocal step, running
        step += 1
        if step == profile.first:
            jax.profiler.start_trace(workdir / FOLDER)
            running = True
        if not running:
            return train_step(*arguments)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = train_step(*arguments)
        if step == profile.last:
            jax.block_until_ready(result)
            stop()
        return result

    try:
        yield traced
    finally:
        stop()
