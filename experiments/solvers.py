"""Compare all solvers where the exact solution is known: a mixture of four Gaussians.

  python -m experiments.solvers --out=solvers
  python -m experiments.solvers --out=solvers --path=edm --grid=karras

Writes convergence.png and convergence.md. The model is the mixture's best denoiser; no run, data or
network is needed. Solvers with fresh noise are listed without an error: their trajectories have no
exact end.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

from absl import flags

from diffjax import choices
from diffjax.errors import UserError
from diffjax.evaluation import convergence
from diffjax.spec import build, choose
from experiments import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("out", None, "folder to write into", flag_values=FLAGS)
flags.DEFINE_string("path", "linear", "from data to noise", flag_values=FLAGS)
flags.DEFINE_string("grid", "uniform", "where solvers step", flag_values=FLAGS)
BUDGETS = (5, 10, 20, 40, 80, 160)


def main(args: SimpleNamespace) -> None:
    """Measures, writes, and prints the table."""
    cli.require(args, "out")
    named = {name: choices.solver_called(name) for name in choices.SOLVERS}
    found = convergence.convergence(
        convergence.mixture_of_four(),
        build(choose(choices.PATHS, args.path, "path")),
        {name: solver for name, solver in named.items() if solver.nfe is not None},
        build(choose(choices.GRIDS, args.grid, "grid")),
        BUDGETS,
    )
    table = convergence.convergence_table(found, BUDGETS)
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "convergence.md").write_text(table, encoding="utf-8")
        (folder / "convergence.png").write_bytes(convergence.convergence_plot(found))
    except OSError as error:
        raise UserError(f"can't write into {folder}: {error.strerror}") from error
    print(f"{table}convergence.md and convergence.png in {folder}")


USAGE = f"""{__doc__}
Paths: {", ".join(choices.PATHS)}
Grids: {", ".join(choices.GRIDS)}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
