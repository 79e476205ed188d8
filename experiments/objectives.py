"""Compare all objectives: effective weights by log-SNR, and legal combinations.

  python -m experiments.objectives --out=objectives
  python -m experiments.objectives --out=objectives --cost

Writes index.html, and its plot and tables as separate files, in about a minute. It needs no run,
data or network connection. With --cost it instead compiles a training step of each objective with
a small DiT, counts its FLOPs, and writes cost.md, in some minutes.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

from absl import flags

from diffjax import choices
from diffjax.errors import UserError
from diffjax.host.progress import progress
from diffjax.performance.objective_costs import cost_table
from diffjax.reports.objectives_page import write_objectives_page
from experiments.flags import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("out", None, "folder to write into", flag_values=FLAGS)
flags.DEFINE_boolean("cost", False, "count the FLOPs of a training step", flag_values=FLAGS)


def main(args: SimpleNamespace) -> None:
    """Writes the page and prints its path."""
    cli.require(args, "out")
    if args.cost:
        write_costs(Path(args.out))
        return
    with progress("computing the effective weights of all objectives, a minute or more"):
        page = write_objectives_page(args.out)
    print(f"open {page}")


def write_costs(folder: Path) -> None:
    """Writes cost.md into a folder and prints it.

    Raises:
        UserError: the folder can't be written to; this is checked first.
    """
    file = folder / "cost.md"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.touch()
        with progress("measuring the cost of all objectives"):
            table = cost_table(f"objective={name}" for name in choices.OBJECTIVES)
        file.write_text(table, "utf-8")
    except OSError as error:
        raise UserError(f"can't write into {folder}: {error.strerror}") from error
    print(f"{table}{file}")


USAGE = __doc__ or ""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
