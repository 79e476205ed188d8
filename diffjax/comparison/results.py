"""Reads the files of several runs, of a sweep or of any folders, for a comparison."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from diffjax.config_upgrade import upgrade
from diffjax.errors import UserError
from diffjax.evaluation.tables import is_number
from diffjax.host.run_files import read_json

CONFIG, RUN, EVALUATION = "config.json", "run.json", "evaluation.json"
PROBES, STATUS, SWEEP = "probes.json", "status.json", "sweep.json"
LIKELIHOOD = "likelihood.json"
_DONE, _FAILED = "done", "failed"


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run's folder; missing files are empty mappings.

    Attributes:
        name: name of the cell, or of the folder.
        arm: the name without the seed; arms are compared.
        folder: the run's folder.
        config: the resolved config.
        run: `run.json`: machine, versions, time and cost.
        evaluation: metrics at the end of its training.
        likelihood: bits per dimension by method.
        probes: probes of the trained model.
        status: status of the cell, written by a worker of a sweep.
        damage: messages about files that can't be read, or belong to another step.
        cell: its row in `sweep.json`.
    """

    name: str
    arm: str
    folder: Path
    config: Mapping[str, Any]
    run: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    likelihood: Mapping[str, Any]
    probes: Mapping[str, Any]
    status: Mapping[str, Any]
    damage: tuple[str, ...]
    cell: Mapping[str, Any]

    @property
    def seed(self) -> Any:
        """The training seed; None if it is not known."""
        return self.config.get("seed", (self.cell.get("axes") or {}).get("config.seed"))

    @property
    def state(self) -> str:
        """State of the run: `done`, `failed`, `running`, `waiting` or `not evaluated`.

        A cell can fail after its evaluation, because its probes come last.
        """
        state = self.status.get("state")
        if self.evaluation and state != _FAILED:
            return _DONE
        if state and state != _DONE:
            return str(state)
        return "not evaluated" if self.config else "waiting"

    @property
    def grid(self) -> Path | None:
        """Path of the last picture of samples; None before the first."""
        found = [
            path
            for path in (self.folder / "samples").glob("step_*.png")
            if path.stem.removeprefix("step_").isdecimal()
        ]
        return max(found, key=lambda path: int(path.stem.removeprefix("step_")), default=None)


@dataclass(frozen=True)
class SweepFiles:
    """The runs of a comparison.

    Attributes:
        name: name of the sweep, or of the folder.
        sweep: content of `sweep.json`, or the same structure derived from the runs.
        runs: all runs in the order of the cells.
        given: the folders as specified by the user.
    """

    name: str
    sweep: Mapping[str, Any]
    runs: tuple[RunFiles, ...]
    given: tuple[Path, ...]

    @property
    def arms(self) -> list[str]:
        """The names of the arms, in the order of their first runs."""
        return list(dict.fromkeys(run.arm for run in self.runs))

    def of(self, arm: str) -> list[RunFiles]:
        """The runs of an arm."""
        return [run for run in self.runs if run.arm == arm]


def read_sweep(workdirs: Iterable[str | Path]) -> SweepFiles:
    """Reads a sweep's folder, a folder of runs, or several folders of runs.

    Without a `sweep.json`, runs whose configs differ only in `seed` form one arm. Its name is the
    common beginning of their folders' names.

    Args:
        workdirs: the folders.

    Raises:
        UserError: a folder contains no run, or two runs have the same name.
    """
    given = tuple(Path(workdir) for workdir in workdirs)
    if len(given) == 1 and (given[0] / SWEEP).exists():
        return _sweep(given[0])
    folders = [folder for path in given for folder in _run_folders(path)]
    if not folders:
        raise UserError("there is no folder to report on: set --workdir=DIR")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [folder.as_posix() for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} is listed twice")
    runs = [_read(folder, name, name, {}) for folder, name in zip(folders, names, strict=True)]
    arms = _arms(runs)
    runs = [_read(run.folder, run.name, arms[run.name], {}) for run in runs]
    cells = [
        {"name": run.name, "arm": run.arm, "axes": {"config.seed": run.seed}, "folder": run.name}
        for run in runs
    ]
    name = given[0].resolve().name if len(given) == 1 else "comparison"
    return SweepFiles(name, {"name": name, "cells": cells, "left_out": []}, tuple(runs), given)


def _sweep(folder: Path) -> SweepFiles:
    sweep = read_json(folder / SWEEP) or {}
    runs = []
    for cell in cells_of(sweep, folder):
        path = folder / str(cell.get("folder") or cell["name"])
        runs.append(_read(path, cell["name"], str(cell.get("arm") or cell["name"]), cell))
    name = str(sweep.get("name") or folder.resolve().name)
    return SweepFiles(name, sweep, tuple(runs), (folder,))


def cells_of(sweep: Mapping[str, Any], folder: Path) -> list[Mapping[str, Any]]:
    """The cells of a sweep's plan, each with a `name`.

    Raises:
        UserError: the plan has no valid list of cells.
    """
    cells = sweep.get("cells")
    if not isinstance(cells, list) or not all(
        isinstance(cell, Mapping) and isinstance(cell.get("name"), str) for cell in cells
    ):
        raise UserError(
            f"{folder / SWEEP} has no list of cells with names: run experiments.sweep again"
        )
    return cells


def _run_folders(path: Path) -> list[Path]:
    """The folder itself if it is a run's, or the folders of all runs in it."""
    if (path / CONFIG).exists():
        return [path]
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    found = sorted(child for child in path.iterdir() if (child / CONFIG).exists())
    if not found:
        raise UserError(f"there is no run in {path}: python -m experiments.train makes one")
    return found


def last_step(config: Any, run: Mapping[str, Any]) -> Any:
    """The step at which a run ends: `num_steps`, or where it was stopped early."""
    return (run.get("stopped_early") or {}).get("step", config.get("num_steps", 0))


def _read(folder: Path, name: str, arm: str, cell: Mapping[str, Any]) -> RunFiles:
    damage = []

    def content(file: str) -> Mapping[str, Any]:
        try:
            return read_json(folder / file) or {}
        except UserError as error:
            damage.append(str(error))
            return {}

    saved, evaluation = content(CONFIG), content(EVALUATION)
    config = upgrade(saved) if saved else {}
    run = content(RUN)
    step, end = evaluation.get("step", 0), last_step(config, run)
    if is_number(step) and is_number(end) and 0 < step < end:  # evaluated before the end
        damage.append(f"{folder / EVALUATION} is of step {step} of {end}: not compared")
        evaluation = {}
    return RunFiles(
        name,
        arm,
        folder,
        config=config,
        run=run,
        evaluation=evaluation,
        likelihood=content(LIKELIHOOD),
        probes=content(PROBES),
        status=content(STATUS),
        damage=tuple(damage),
        cell=cell,
    )


def _arms(runs: Iterable[RunFiles]) -> dict[str, str]:
    """The arm of each run, by the run's name."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        same = {key: value for key, value in run.config.items() if key != "seed"}
        groups.setdefault(json.dumps(same, sort_keys=True) if same else run.name, []).append(
            run.name
        )
    arms: dict[str, str] = {}
    for names in groups.values():
        common = re.sub(r"[-_.]*(seed)?[-_=]*$", "", _common_start(names))
        taken = not common or common in arms.values()
        arms |= dict.fromkeys(names, names[0] if taken or len(names) == 1 else common)
    return arms


def _common_start(names: Iterable[str]) -> str:
    letters = takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    return "".join(column[0] for column in letters)
