"""Train every cell of a sweep and put the results into one table.

  python -m experiments.sweep --sweep=configs/sweeps/digits_objectives.py

Each cell is a run of experiments.train in a folder of its own, one after another. All of them are
built and checked before the first one trains. The same command again goes on where it stopped; a
cell that failed is tried again, and what it said is in its folder's output.txt. With several values
of config.seed the table ends in a verdict: which arms are worse than the best, or can't be told.
"""

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from absl import flags

from diffjax.errors import UserError
from diffjax.evaluation.run_files import read_json
from diffjax.evaluation.sweep_table import sweep_table
from diffjax.evaluation.verdicts import verdict_table
from diffjax.spec import build
from diffjax.sweeps import Cell, Sweep
from diffjax.training import workdirs
from diffjax.training.measure import check_evaluation
from diffjax.training.setup import check_pairs, set_up
from experiments import cli, config_files

FLAGS = flags.FlagValues()
flags.DEFINE_string("sweep", None, "file with a get_sweep()", flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "folder; runs/sweeps/NAME by default", flag_values=FLAGS)
flags.DEFINE_bool("dry_run", False, "check all cells, list them, and stop", flag_values=FLAGS)


def main(args: SimpleNamespace) -> int:
    """Trains what is not trained yet, prints the table and names its file."""
    cli.require(args, "sweep")
    sweep = config_files.returned_by(args.sweep, "get_sweep", Sweep)
    workdir = Path(args.workdir or Path("runs") / "sweeps" / Path(args.sweep).stem)
    cells = sweep.cells()
    reasons = {cell.name: reason for cell in cells if (reason := refusal(cell))}
    for name, reason in reasons.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    cells = [cell for cell in cells if cell.name not in reasons]
    if args.dry_run or not cells:
        print("\n".join(f"{cell.name}: {shlex.join(cell.flags())}" for cell in cells))
        return 0 if cells else 2
    failed = [cell.name for cell in cells if not trained(cell, workdir / cell.name)]
    if failed:
        print(f"failed: {', '.join(failed)}; each one's output.txt says why", file=sys.stderr)
    results = {cell.name: read_json(workdir / cell.name / workdirs.EVALUATION) for cell in cells}
    table = sweep_table({name: result for name, result in results.items() if result})
    table += verdict(cells, results)
    (workdir / "table.md").write_text(table, encoding="utf-8")
    print(f"{table}\nin {workdir / 'table.md'}")
    return 2 if failed else 0


def verdict(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any] | None]) -> str:
    """What several seeds say of the arms, by the distance of each run's own recipe; "" for one."""
    arms: dict[str, list[float]] = {}
    for cell in cells:
        result = results[cell.name]
        arms.setdefault(cell.arm, []).append(
            np.nan if result is None else result["frechet_distance"]["value"]
        )
    whole = {arm: values for arm, values in arms.items() if np.isfinite(values).all()}
    if len(whole) < 2 or min(map(len, whole.values())) < 2:
        return ""
    title = "Fréchet distance of each run's own recipe, by seeds:"
    return f"\n{title}\n\n{verdict_table(whole)}"


def refusal(cell: Cell) -> str | None:
    """Why a cell can't run, or None; nothing is trained or written."""
    try:
        config = config_files.load(cell.location)
        known = config_files.settings(config)
        for name, text in cell.overrides.items():
            if name not in known:
                raise UserError(f"there is no setting {name}")
            known[name].set(known[name].parse(text))
        config = config_files.lock(config, known)
        dataset = build(config.data)
        check_pairs(set_up(config, dataset.image_shape, dataset.num_classes), dataset)
        check_evaluation(config, dataset.image_shape)
    except UserError as error:
        return str(error)
    return None


def trained(cell: Cell, workdir: Path) -> bool:
    """Runs a cell in a process of its own, or finds it finished; whether it is."""
    workdir.mkdir(parents=True, exist_ok=True)
    print(f"{cell.name}: {workdir}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "experiments.train", *cell.flags(), f"--workdir={workdir}"]
    with open(workdir / "output.txt", "w", encoding="utf-8") as output:
        return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode == 0


USAGE = __doc__ or ""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
