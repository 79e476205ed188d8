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

from absl import flags

from diffjax.errors import UserError
from diffjax.evaluation.comparison import compare, quality_markdown, verdict_markdown
from diffjax.evaluation.run_files import read_json
from diffjax.spec import build
from diffjax.sweeps import Cell, Cost, Sweep
from diffjax.training import workdirs
from diffjax.training.loop import train_flops
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
    cells, reasons = planned(sweep)
    for name, reason in reasons.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    if args.dry_run or not cells:
        print("\n".join(f"{cell.name}: {shlex.join(cell.flags())}" for cell in cells))
        return 0 if cells else 2
    failed = [cell.name for cell in cells if not trained(cell, workdir / cell.name)]
    if failed:
        print(f"failed: {', '.join(failed)}; each one's output.txt says why", file=sys.stderr)
    results = {cell.name: read_json(workdir / cell.name / workdirs.EVALUATION) for cell in cells}
    table = findings(sweep, cells, results)
    (workdir / "table.md").write_text(table, encoding="utf-8")
    print(f"{table}\nin {workdir / 'table.md'}")
    return 2 if failed else 0


def findings(
    sweep: Sweep, cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any] | None]
) -> str:
    """What the sweep says, as Markdown: the verdict first, then each arm at each cost."""
    found = {name: result for name, result in results.items() if result}
    comparison = compare(found, {cell.name: cell.arm for cell in cells})
    parts = [
        sweep.question,
        f"Fréchet distance at {comparison.own}, matched in {sweep.matched}. {comparison.rule}",
        verdict_markdown(comparison),
        quality_markdown(comparison),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def planned(sweep: Sweep) -> tuple[list[Cell], dict[str, str]]:
    """The cells that can run, matched; and why each of the others can't. Nothing is trained."""
    costs: dict[str, Cost] = {}
    reasons: dict[str, str] = {}
    for cell in sweep.cells():
        try:
            costs[cell.name] = cost(cell, counted=sweep.matched == "flops")
        except UserError as error:
            reasons[cell.name] = str(error)
    return sweep.matched_cells(costs), reasons


def cost(cell: Cell, counted: bool = False) -> Cost:
    """Builds a cell and checks that all of it fits together; what its training costs.

    Raises:
        UserError: why it can't run.
    """
    config = config_files.load(cell.location)
    known = config_files.settings(config)
    for name, text in cell.overrides.items():
        if name not in known:
            raise UserError(f"there is no setting {name}")
        known[name].set(known[name].parse(text))
    config = config_files.lock(config, known)
    dataset = build(config.data)
    setup = set_up(config, dataset.image_shape, dataset.num_classes)
    check_pairs(setup, dataset)
    check_evaluation(config, dataset.image_shape)
    return Cost(config.num_steps, config.batch_size, train_flops(setup) if counted else None)


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
