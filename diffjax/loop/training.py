"""What one training works on and with, in one value."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffjax.data import DataSet
from diffjax.host.watchdog import Watchdog
from diffjax.loop.profile import Profile
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.evaluators import Evaluator, evaluators_of
from diffjax.runs.setup import Setup
from diffjax.spec import to_json


@dataclass(frozen=True, eq=False)
class Training:
    """What one training works on and with.

    Attributes:
        setup: the parts of the run.
        dataset: what it trains on.
        workdir: the run's folder.
        checkpoints: where its states are stored.
        should_stop: called once a step; whether to save and end there.
        watchdog: when steps that don't come are a hang.
        profile: which steps leave a trace.
        command: how to make the run again, for its page.
    """

    setup: Setup
    dataset: DataSet
    workdir: Path
    checkpoints: Checkpoints
    should_stop: Callable[[], bool] = lambda: False
    watchdog: Watchdog = Watchdog()
    profile: Profile = Profile()
    command: str = ""

    @cached_property
    def evaluators(self) -> dict[str, Evaluator]:
        """The evaluators of the config by name; one object for the whole training."""
        return evaluators_of(self.setup.config)

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What is stored beside each state."""
        config = json.loads(to_json(self.setup.config))
        return {"config": config, "data_sha256": self.dataset.train.fingerprint()}


def checkpoints_of(setup: Setup, workdir: Path) -> Checkpoints:
    """The checkpoints of a run that trains; the newest and some at intervals are kept."""
    config = setup.config
    most, every = config.checkpoints_to_keep, config.checkpoints_kept_every_steps
    return Checkpoints(workdir / "checkpoints", most, every)
