"""What one training works on and with, in one value."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffjax.data import DataSet
from diffjax.host.watchdog import Watchdog
from diffjax.loop.profile import Profile
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.setup import Setup


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


def checkpoints_of(setup: Setup, workdir: Path) -> Checkpoints:
    """The checkpoints of a run that trains; the newest and some at intervals are kept."""
    config = setup.config
    most, every = config.checkpoints_to_keep, config.checkpoints_kept_every_steps
    return Checkpoints(workdir / "checkpoints", most, every)
