"""Cells of a sweep: whether they can run, training them, and whether that is done."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from diffjax import config_files
from diffjax.comparison.results import PROBES, STATUS
from diffjax.config_upgrade import upgrade
from diffjax.ensemble.ensemble import MembersFailed, groups, train_together
from diffjax.errors import UserError
from diffjax.host.run_files import read_json
from diffjax.loop.loop import prepared, train, train_flops
from diffjax.runs import workdirs
from diffjax.runs.probe import probe_run
from diffjax.spec import TARGET, to_json
from diffjax.sweeps.sweep import Cell, Cost, Sweep


def resolved(cell: Cell) -> ConfigDict:
    """The locked config of a cell.

    Raises:
        UserError: one of its settings does not exist or takes another type.
    """
    config = config_files.load(cell.location)
    return config_files.lock(config, config_files.override(config, cell.overrides))


def planned(sweep: Sweep) -> tuple[list[Cell], dict[str, Cost], dict[str, str]]:
    """The cells that can run, matched; what a step of each costs; why the others can't run.

    Nothing is trained or written. What differs in its seed alone is built once.
    """
    costs: dict[str, Cost] = {}
    reasons: dict[str, str] = {}
    built: dict[str, Cost] = {}
    for cell in sweep.cells():
        try:
            config = resolved(cell)
            arm = to_json(ConfigDict({**config.to_dict(), "seed": None}))
            if arm not in built:
                built[arm] = cost(config, counted=sweep.matched == "flops")
            costs[cell.name] = built[arm]
        except UserError as error:
            reasons[cell.name] = str(error)
    return sweep.matched_cells(costs), costs, reasons


def together(cells: Sequence[Cell], most: int) -> list[list[str]]:
    """Names of cells that train as one program, at most so many at once."""
    if most == 1:
        return [[cell.name] for cell in cells]
    configs = {cell.name: resolved(cell) for cell in cells}
    return [list(names) for names in groups(configs, most)]


def cost(config: ConfigDict, counted: bool = False) -> Cost:
    """Builds what a config says and checks that all of it fits; what its training costs.

    Raises:
        UserError: why it can't run.
    """
    setup, _ = prepared(config)
    return Cost(config.num_steps, config.batch_size, train_flops(setup) if counted else None)


def train_cells(cells: Sequence[Cell], folder: Path) -> dict[str, str]:
    """Trains cells in this process, several as one program; returns what failed and why.

    A mistake in one does not stop the others.

    Args:
        cells: what to train; several must be able to train together.
        folder: the sweep's.
    """
    errors: dict[str, str] = {}
    folders = [folder / cell.name for cell in cells]
    commands = [train_command(*each) for each in zip(cells, folders, strict=True)]
    try:
        configs = [resolved(cell) for cell in cells]
        if len(cells) == 1:
            train(configs[0], folders[0], commands[0])
        else:
            train_together(configs, folders, commands)
    except MembersFailed as failed:
        errors = {member.name: error for member, error in failed.failures.items()}
    except UserError as error:
        errors = {cell.name: str(error) for cell in cells}
    for cell in cells:
        try:
            if cell.name not in errors:
                probe_run(folder / cell.name, allowed_packages=packages(resolved(cell)))
        except UserError as error:
            errors[cell.name] = str(error)
    return errors


def packages(config: ConfigDict) -> list[str]:
    """Whose callables a config names, which was the user's own decision."""
    return sorted(set(re.findall(rf'"{TARGET}": "([^.:"]+)', to_json(config))))


def train_command(cell: Cell, workdir: Path) -> str:
    """What makes the run of a cell again, without the sweep."""
    words = ["python", "-m", "experiments.train", *cell.flags(), f"--workdir={workdir}"]
    return shlex.join(words)


def finished(cell: Cell, workdir: Path) -> bool:
    """Whether a cell is trained and evaluated, as its sweep now describes it.

    A folder that says so of another config is not: training there says what differs.
    """
    status = read_json(workdir / STATUS) or {}
    if status.get("state") != "done" or not (workdir / workdirs.REPORT).exists():
        return False
    config = resolved(cell)
    evaluated = (read_json(workdir / workdirs.EVALUATION) or {}).get("step")
    saved = read_json(workdir / workdirs.CONFIG) or {}
    same = upgrade(saved) == json.loads(to_json(config))
    return same and evaluated == config.num_steps and (workdir / PROBES).exists()
