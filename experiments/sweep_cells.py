"""One cell of a sweep: whether it can run, training it, and whether that is done."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from diffjax.errors import UserError
from diffjax.evaluation.run_files import read_json
from diffjax.spec import build, to_json
from diffjax.sweeps import Cell, Cost, Sweep
from diffjax.training import workdirs
from diffjax.training.loop import train, train_flops
from diffjax.training.measure import check_evaluation
from diffjax.training.setup import check_pairs, set_up
from experiments import config_files

STATUS = "status.json"


def resolved(cell: Cell) -> ConfigDict:
    """The locked config of a cell.

    Raises:
        UserError: one of its settings does not exist or takes another type.
    """
    config = config_files.load(cell.location)
    known = config_files.settings(config)
    for name, text in cell.overrides.items():
        if name not in known:
            raise UserError(f"there is no setting {name}")
        known[name].set(known[name].parse(text))
    return config_files.lock(config, known)


def planned(sweep: Sweep) -> tuple[list[Cell], dict[str, Cost], dict[str, str]]:
    """The cells that can run, matched; what a step of each costs; why the others can't run.

    Nothing is trained or written.
    """
    costs: dict[str, Cost] = {}
    reasons: dict[str, str] = {}
    for cell in sweep.cells():
        try:
            costs[cell.name] = cost(cell, counted=sweep.matched == "flops")
        except UserError as error:
            reasons[cell.name] = str(error)
    return sweep.matched_cells(costs), costs, reasons


def cost(cell: Cell, counted: bool = False) -> Cost:
    """Builds a cell and checks that all of it fits together; what its training costs.

    Raises:
        UserError: why it can't run.
    """
    config = resolved(cell)
    dataset = build(config.data)
    setup = set_up(config, dataset.image_shape, dataset.num_classes)
    check_pairs(setup, dataset)
    check_evaluation(config, dataset.image_shape)
    return Cost(config.num_steps, config.batch_size, train_flops(setup) if counted else None)


def train_cells(cells: Sequence[Cell], folder: Path) -> list[str]:
    """Trains cells, one after another, and gives the names of those that failed.

    A mistake in one is written to stderr, as `error: NAME: what`, and does not stop the others.

    Args:
        cells: what to train, in this process.
        folder: the sweep's.
    """
    failed = []
    for cell in cells:
        workdir = folder / cell.name
        try:
            train(resolved(cell), workdir, train_command(cell, workdir))
            probe_cell(workdir)
        except UserError as error:
            print(f"error: {cell.name}: {' '.join(str(error).split())}", file=sys.stderr)
            failed.append(cell.name)
    return failed


def train_command(cell: Cell, workdir: Path) -> str:
    """What makes the run of a cell again, without the sweep."""
    words = ["python", "-m", "experiments.train", *cell.flags(), f"--workdir={workdir}"]
    return shlex.join(words)


def probe_cell(workdir: Path) -> None:
    """Where probes of a trained cell are made, beside its evaluation; there are none yet."""
    del workdir


def finished(cell: Cell, workdir: Path) -> bool:
    """Whether a cell is trained and evaluated, as its sweep now describes it.

    A folder that says so of another config is not: training there says what differs.
    """
    status = read_json(workdir / STATUS) or {}
    if status.get("state") != "done" or not (workdir / workdirs.REPORT).exists():
        return False
    config = resolved(cell)
    evaluated = (read_json(workdir / workdirs.EVALUATION) or {}).get("step")
    same = read_json(workdir / workdirs.CONFIG) == json.loads(to_json(config))
    return same and evaluated == config.num_steps
