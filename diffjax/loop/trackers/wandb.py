"""Weights & Biases."""

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffjax.loop.trackers.base import Track, Tracked, check_library, library
from diffjax.spec import choose


@dataclass(frozen=True)
class Wandb:
    """A run of Weights & Biases, under the name of the run's folder; `pip install wandb`.

    The account is that of `wandb login`, or of the variables that the library reads itself.

    Args:
        project: its project.
        entity: team or user; "" is the account's own.
        mode: `online`; `offline`, which writes to the run's folder, for `wandb sync`; "" is that of
            `WANDB_MODE`, or online.

    Example:
        >>> Wandb(project="digits", mode="offline").entity
        ''
    """

    project: str = "diffjax"
    entity: str = ""
    mode: str = ""

    def check(self) -> None:
        """Refuses a run without the library, and an unknown mode.

        Raises:
            UserError: W&B is not installed, or there is no such mode.
        """
        choose(dict.fromkeys(("", "online", "offline", "disabled")), self.mode, "mode of wandb")
        check_library("wandb")

    @contextmanager
    def __call__(self, run: Tracked) -> Iterator[Track]:
        """Opens the run: the earlier one if it was tracked before."""
        wandb = library("wandb")
        known = run.known or uuid.uuid4().hex[:12]
        record = wandb.init(
            project=self.project,
            entity=self.entity or None,
            mode=self.mode or None,
            dir=str(run.workdir),
            id=known,
            name=run.name,
            resume="allow",
            config=dict(run.config),
        )
        run.remember(known)
        first = record.starting_step  # Lines that a resumed run repeats are there already.

        def track(step: int, numbers: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
            if step >= first:
                images = {name: wandb.Image(str(path)) for name, path in pictures.items()}
                record.log({**numbers, **images}, step=step)

        try:
            yield track
        finally:
            record.finish()
