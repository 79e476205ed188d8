"""Starting workers until a sweep has nothing left to train."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffjax.comparison.results import STATUS
from diffjax.errors import UserError
from diffjax.host.interrupts import Interrupted
from diffjax.host.run_files import read_json
from diffjax.sweeps.cells import finished
from diffjax.sweeps.engines import Job, Pulse
from diffjax.sweeps.live import Live, rows
from diffjax.sweeps.worker import Unit, busy

_WAIT_SECONDS = 1.0
# How often workers may be started and change nothing: one may be killed before it begins.
_BARREN_ROUNDS = 3


def run_workers(
    engine: Callable[[Job, Pulse], None],
    options: Mapping[str, Any],
    workers: int,
    command: Sequence[str],
    todo: Sequence[Unit],
    folder: Path,
    live: Live,
    should_stop: Callable[[], bool],
) -> None:
    """Has workers started, and again where some died, until every cell is done or has failed.

    A cell that somebody else's workers have is waited for.

    Raises:
        UserError: workers ended, again and again, and left everything as it was.
        Interrupted: it was asked to stop; the workers have saved.
    """
    output = folder / "workers"
    output.mkdir(exist_ok=True)
    pending = [cell for unit in todo for cell in unit if not finished(cell, folder / cell.name)]
    # Until its status is written anew, a failure is that of an earlier command.
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

    before, barren = None, 0
    while units := left():
        free = [unit for unit in units if not any(busy(folder / cell.name) for cell in unit)]
        if free:
            state = [(row.name, row.state, row.step) for row in rows(folder)]
            barren = barren + 1 if state == before else 0
            if barren == _BARREN_ROUNDS:
                raise UserError(
                    f"workers end and leave {len(units)} of {len(todo)} cells as they are; what "
                    f"they said is in {output}"
                )
            before = state
            engine(Job(command, min(workers, len(free)), output, options), pulse)
        else:
            pulse()
            time.sleep(_WAIT_SECONDS)
        if should_stop():
            live.draw(now=True)
            done = len(todo) - len(left())
            raise Interrupted(
                f"stopped with {done} of {len(todo)} cells done; the same command goes on"
            )
    live.draw(now=True)
