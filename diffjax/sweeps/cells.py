"""Checks the cells of a sweep, trains them, and reports which are finished."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from diffjax import config_files
from diffjax.comparison.results import PROBES, STATUS, last_step
from diffjax.config_upgrade import upgrade
from diffjax.ensemble.ensemble import MembersFailed, train_together
from diffjax.ensemble.grouping import ensemble_groups
from diffjax.errors import UserError
from diffjax.host.run_files import read_json
from diffjax.loop.compiled_step import train_flops
from diffjax.loop.loop import prepared, train
from diffjax.runs import workdirs
from diffjax.runs.measuring.probe import probe_run
from diffjax.spec import TARGET, to_json
from diffjax.sweeps.sweep import Cell, Cost, Sweep


def resolved(cell: Cell) -> ConfigDict:
    """Loads the config of a cell, applies its settings and locks it.

    Raises:
        UserError: one of its settings does not exist or has another type.
    """
    config = config_files.load(cell.location, cell.overrides)
    return config_files.lock(config, config_files.override(config, cell.overrides))


class Planned(NamedTuple):
    """The cells of a sweep.

    Attributes:
        cells: the valid ones, with matched costs.
        costs: their costs by name.
        left_out: the reason why a cell is not valid, by its name.
        ensembles: the names of cells that train as one program, in groups.
    """

    cells: list[Cell]
    costs: dict[str, Cost]
    left_out: dict[str, str]
    ensembles: list[list[str]]


def plan_cells(sweep: Sweep, most: int = 1) -> Planned:
    """Builds all cells of a sweep, and groups those that can train as one program.

    Nothing is trained or written. Cells that differ only in their seed are built once.

    Args:
        sweep: which cells there are, and the budget that they share.
        most: cells of a group.
    """
    costs: dict[str, Cost] = {}
    reasons: dict[str, str] = {}
    built: dict[str, Cost] = {}
    for cell in sweep.cells():
        try:
            config = resolved(cell)
            arm = to_json(ConfigDict({**config.to_dict(), "seed": None}))
            if arm not in built:
                built[arm] = training_cost(config, counted=sweep.matched == "flops")
            costs[cell.name] = built[arm]
        except UserError as error:
            reasons[cell.name] = str(error)
    cells = sweep.matched_cells(costs)
    if most == 1:
        return Planned(cells, costs, reasons, [[cell.name] for cell in cells])
    configs = {cell.name: resolved(cell) for cell in cells}
    groups = [list(names) for names in ensemble_groups(configs, most)]
    return Planned(cells, costs, reasons, groups)


def training_cost(config: ConfigDict, counted: bool = False) -> Cost:
    """Builds a config, checks that its parts fit together, and returns the cost of its training.

    Args:
        config: a resolved config.
        counted: whether to count the FLOPs of a step.

    Raises:
        UserError: the config can't run.
    """
    setup, _ = prepared(config)
    return Cost(config.num_steps, config.batch_size, train_flops(setup) if counted else None)


def train_cells(
    cells: Sequence[Cell], folder: Path, *, extend: bool | str = False
) -> dict[str, str]:
    """Trains cells in this process, several as one program; returns error messages by cell name.

    An error in one cell does not stop the others.

    Args:
        cells: the cells to train; several must be able to train together.
        folder: the sweep's folder.
        extend: continue a cell though its config differs, as `diffjax.train`; of one cell alone.
    """
    errors: dict[str, str] = {}
    folders = [folder / cell.name for cell in cells]
    commands = [train_command(*each, extend) for each in zip(cells, folders, strict=True)]
    configs: list[ConfigDict] = []
    try:
        configs = [resolved(cell) for cell in cells]
        if len(cells) == 1:
            train(configs[0], folders[0], commands[0], extend=extend)
        else:
            train_together(configs, folders, commands)
    except MembersFailed as failed:
        errors = {member.name: error for member, error in failed.failures.items()}
    except UserError as error:
        errors = {cell.name: str(error) for cell in cells}
    for config, workdir in zip(configs, folders, strict=False):  # without configs all have failed
        try:
            if workdir.name not in errors:
                probe_run(workdir, allowed_packages=packages(config))
        except UserError as error:
            errors[workdir.name] = str(error)
    return errors


def packages(config: ConfigDict) -> list[str]:
    """Packages of the callables that a config names; the user's own config is trusted."""
    return sorted(set(re.findall(rf'"{TARGET}": "([^.:"]+)', to_json(config))))


def train_command(cell: Cell, workdir: Path, extend: bool | str = False) -> str:
    """The shell command that trains a cell without the sweep."""
    words = ["python", "-m", "experiments.train", *cell.flags(), f"--workdir={workdir}"]
    return shlex.join([*words, *extend_flag(extend)])


def extend_flag(extend: bool | str) -> list[str]:
    """The words of `--extend` on a command line, none if it is not set.

    Example:
        >>> extend_flag(True), extend_flag("restart"), extend_flag(False)
        (['--extend'], ['--extend=restart'], [])
    """
    if not extend:
        return []
    return ["--extend"] if extend is True else [f"--extend={extend}"]


def is_finished(cell: Cell, workdir: Path) -> bool:
    """Whether a cell is trained and evaluated with the config that its sweep has now.

    A folder with another config is not finished; training there reports the difference.
    """
    status = read_json(workdir / STATUS) or {}
    if status.get("state") != "done" or not (workdir / workdirs.REPORT).exists():
        return False
    config = resolved(cell)
    evaluated = (read_json(workdir / workdirs.EVALUATION) or {}).get("step")
    same = upgrade(read_json(workdir / workdirs.CONFIG) or {}) == json.loads(to_json(config))
    probed = (read_json(workdir / PROBES) or {}).get("step")
    end = last_step(config, read_json(workdir / workdirs.RUN) or {})
    return same and evaluated == probed == end
