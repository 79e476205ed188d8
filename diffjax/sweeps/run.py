"""Starts workers until all cells of a sweep are done or have failed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from diffjax.comparison.results import STATUS
from diffjax.errors import UserError
from diffjax.host.interrupts import Interrupted
from diffjax.host.run_files import read_json
from diffjax.sweeps.cells import is_finished
from diffjax.sweeps.engines import Job, Pulse
from diffjax.sweeps.live import Live, rows
from diffjax.sweeps.worker import Unit, busy

_WAIT_SECONDS = 1.0
# Workers are started again this many times without progress: one may be killed before it begins.
_ROUNDS_WITHOUT_PROGRESS = 3


def run_workers(
    engine: Callable[[Job, Pulse], None],
    job: Job,
    todo: Sequence[Unit],
    folder: Path,
    live: Live,
    should_stop: Callable[[], bool],
) -> None:
    """Starts workers, and replaces those that died, until every cell is done or has failed.

    It also waits for cells that workers of other commands are training.

    Args:
        engine: starts copies of the job's command; one of `ENGINES`.
        job: the command of a worker; at most `job.copies` of them run at the same time.
        todo: all units of the sweep.
        folder: the sweep's folder.
        live: the display of the progress.
        should_stop: whether a signal was received.

    Raises:
        UserError: workers ended repeatedly without any progress.
        Interrupted: a signal was received; the workers have saved.
    """
    job.folder.mkdir(exist_ok=True)
    pending = [cell for unit in todo for cell in unit if not is_finished(cell, folder / cell.name)]
    # A failure counts only after the status changed: an old one is that of an earlier command.
    old = {cell.name: read_json(folder / cell.name / STATUS) for cell in pending}

    def left() -> list[Unit]:
        def over(name: str) -> bool:
            status = read_json(folder / name / STATUS)
            ended = (status or {}).get("state") in ("done", "failed")
            return name not in old or (ended and status != old[name])

        return [unit for unit in todo if not all(over(cell.name) for cell in unit)]

    def pulse() -> bool:
        live.draw()
        return should_stop()

    before, without_progress = None, 0
    while units := left():
        free = [unit for unit in units if not any(busy(folder / cell.name) for cell in unit)]
        if free:
            state = [(row.name, row.state, row.step) for row in rows(folder)]
            without_progress = without_progress + 1 if state == before else 0
            if without_progress == _ROUNDS_WITHOUT_PROGRESS:
                raise UserError(
                    f"workers ended without progress on {len(units)} of {len(todo)} cells; their "
                    f"output is in {job.folder}"
                )
            before = state
            engine(replace(job, copies=min(job.copies, len(free))), pulse)
        else:
            pulse()
            time.sleep(_WAIT_SECONDS)
        if should_stop():
            live.draw(now=True)
            done = len(todo) - len(left())
            raise Interrupted(
                f"stopped with {done} of {len(todo)} cells done; run the same command to resume"
            )
    live.draw(now=True)
