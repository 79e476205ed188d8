"""Aim."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffjax.loop.trackers.base import Track, Tracked, check_library, library


@dataclass(frozen=True)
class Aim:
    """A run of Aim, under the name of the run's folder; `pip install aim`.

    Args:
        repo: the folder of its repository, or the address of its server, `aim://HOST:53800`; "" is
            Aim's own choice, `.aim` where the command is started.
        experiment: the group of runs that it belongs to.

    Example:
        >>> Aim(repo="runs").experiment
        'diffjax'
    """

    repo: str = ""
    experiment: str = "diffjax"

    def check(self) -> None:
        """Refuses a run without the library.

        Raises:
            UserError: it is not installed.
        """
        check_library("aim")

    @contextmanager
    def __call__(self, run: Tracked) -> Iterator[Track]:
        """Opens the run: the earlier one if it was tracked before."""
        aim = library("aim")
        record = aim.Run(
            run_hash=run.known or None,
            repo=self.repo or None,
            experiment=self.experiment,
            system_tracking_interval=None,
            capture_terminal_logs=False,
        )
        run.remember(record.hash)
        record.name, record["config"] = run.name, dict(run.config)

        def track(step: int, numbers: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
            for name, value in numbers.items():
                record.track(value, name=name, step=step)
            for name, path in pictures.items():
                record.track(aim.Image(str(path)), name=name, step=step)

        try:
            yield track
        finally:
            record.close()
