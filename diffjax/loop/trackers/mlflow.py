"""MLflow."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffjax.loop.trackers.base import Track, Tracked, check_library, library

_MOST_PARAMETERS = 100  # of one call
_LONGEST = 500  # letters of a parameter's value


@dataclass(frozen=True)
class MLflow:
    """A run of MLflow, under the name of the run's folder; `pip install mlflow`.

    Args:
        uri: its server, `http://HOST:5000`; or a file, `sqlite:///runs/mlflow.db`. "" is MLflow's
            own choice: that of `MLFLOW_TRACKING_URI`, or files where the command is started.
        experiment: its experiment, which is made if there is none.

    Example:
        >>> MLflow(uri="sqlite:///runs/mlflow.db").experiment
        'diffjax'
    """

    uri: str = ""
    experiment: str = "diffjax"

    def check(self) -> None:
        """Refuses a run without the library.

        Raises:
            UserError: it is not installed.
        """
        check_library("mlflow")

    @contextmanager
    def __call__(self, run: Tracked) -> Iterator[Track]:
        """Opens the run: the earlier one if it was tracked before."""
        entities = library("mlflow.entities")
        client = library("mlflow.tracking").MlflowClient(tracking_uri=self.uri or None)
        known, last = run.known, -1
        if known:
            client.update_run(known, status="RUNNING")
            names = client.get_run(known).data.metrics
            steps = [each.step for name in names for each in client.get_metric_history(known, name)]
            last = max(steps, default=-1)  # Lines that a resumed run repeats are there already.
        else:
            found = client.get_experiment_by_name(self.experiment)
            place = found.experiment_id if found else client.create_experiment(self.experiment)
            known = client.create_run(place, run_name=run.name).info.run_id
            run.remember(known)
            settings = [
                entities.Param(name, str(value)[:_LONGEST]) for name, value in flat(run.config)
            ]
            for i in range(0, len(settings), _MOST_PARAMETERS):
                client.log_batch(known, params=settings[i : i + _MOST_PARAMETERS])

        def track(step: int, numbers: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
            if step > last:
                now = int(1000 * time.time())
                metrics = [
                    entities.Metric(name, value, now, step) for name, value in numbers.items()
                ]
                client.log_batch(known, metrics=metrics)
            for path in pictures.values():
                client.log_artifact(known, str(path), "samples")

        try:
            yield track
        finally:
            client.set_terminated(known)


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a config by their dotted names.

    Example:
        >>> list(flat({"a": {"b": 1}, "c": 2}))
        [('a.b', 1), ('c', 2)]
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
