"""The parts, data, folder and settings of one training, in one value."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffjax.data import DataSet
from diffjax.host.watchdog import Watchdog
from diffjax.loop.callbacks import Callback
from diffjax.loop.profile import Profile
from diffjax.loop.trackers.base import Tracking
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.measuring.evaluators import Evaluator, evaluators_of
from diffjax.runs.setup import Setup
from diffjax.spec import to_json


@dataclass(frozen=True, eq=False)
class Training:
    """The parts, data, folder and settings of one training.

    Attributes:
        setup: the parts of the run.
        dataset: what it trains on.
        workdir: the run's folder.
        checkpoints: where its states are stored.
        should_stop: called before the first step and after each; if it returns True, the run saves
            and ends there.
        watchdog: after how long without a step the run counts as hanging.
        profile: which steps leave a trace.
        command: the command that repeats the run, for its page.
        trackers: receive its numbers and pictures besides its folder.
        callbacks: functions of the user's, called with each line of its metrics.
    """

    setup: Setup
    dataset: DataSet
    workdir: Path
    checkpoints: Checkpoints
    should_stop: Callable[[], bool] = lambda: False
    watchdog: Watchdog = Watchdog()
    profile: Profile = Profile()
    command: str = ""
    trackers: Sequence[Tracking] = ()
    callbacks: Sequence[Callback] = ()

    @cached_property
    def evaluators(self) -> dict[str, Evaluator]:
        """The evaluators of the config by name; one object for the whole training."""
        return evaluators_of(self.setup.config)

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Plain data stored beside each state: the config and the fingerprint of the data."""
        config = json.loads(to_json(self.setup.config))
        return {"config": config, "data_sha256": self.dataset.train.fingerprint()}


def checkpoints_of(setup: Setup, workdir: Path) -> Checkpoints:
    """The checkpoints of a run that trains; the newest and some at intervals are kept."""
    config = setup.config
    most, every = config.checkpoints_to_keep, config.checkpoints_kept_every_steps
    return Checkpoints(workdir / "checkpoints", most, every)
