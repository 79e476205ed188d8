"""Compare all solvers on data whose exact solution is known: a mixture of four Gaussians.

  python -m experiments.solvers --out=solvers
  python -m experiments.solvers --out=solvers --path=edm --grid=karras
  python -m experiments.solvers --out=solvers --cost

Writes convergence.png and convergence.md. The model is the mixture's optimal denoiser; no run, data
or network is needed. The error is the median distance from the end of the exact flow; for
stochastic solvers it is that of mean and covariance, to about 0.003. With --cost it instead
measures each solver's own arithmetic as a share of the network evaluations of a DiT-S/2 on latents
of 32x32x4, and writes cost.md.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from absl import flags

from diffjax import choices, lookup
from diffjax.errors import UserError
from diffjax.host.progress import progress
from diffjax.models.dit import SIZES, DiT
from diffjax.process.paths import Path as ProcessPath
from diffjax.process.precond import Meaning
from diffjax.sampling.solvers import Solver
from diffjax.spec import build, choose
from diffjax.studies import convergence
from diffjax.studies.solver_cost import solver_costs
from experiments.flags import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("out", None, "folder of the results", flag_values=FLAGS)
flags.DEFINE_string("path", "linear", "name of the path", flag_values=FLAGS)
flags.DEFINE_string("grid", "uniform", "name of the time grid", flag_values=FLAGS)
flags.DEFINE_boolean("cost", False, "measure the solvers' own arithmetic", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 4, "--cost: images per batch", lower_bound=1, flag_values=FLAGS)
BUDGETS = (5, 10, 20, 40, 80, 160)


def main(args: SimpleNamespace) -> None:
    """Measures the solvers, writes the results, and prints the table."""
    cli.require(args, "out")
    named = {name: lookup.solver_called(name) for name in choices.SOLVERS}
    path = build(choose(choices.PATHS, args.path, "path"))
    with progress("measuring the cost or the error of all solvers"):
        if args.cost:
            files = {"cost.md": cost_table(args.batch_size, path, named)}
        else:
            files = compare(args.grid, path, named)
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise UserError(f"can't write into {folder}: {error.strerror}") from error
    tables = (content.decode() for name, content in files.items() if name.endswith(".md"))
    print("".join(tables) + f"{' and '.join(files)} in {folder}")


def compare(grid: str, path: ProcessPath, named: Mapping[str, Solver]) -> dict[str, bytes]:
    """Measures error against evaluations; returns the contents of files by name."""
    found = convergence.convergence(
        convergence.mixture_of_four(),
        path,
        # Solvers that jump along an exact flow map have no discretisation error.
        {
            name: solver
            for name, solver in named.items()
            if solver.nfe is not None and solver.needs is Meaning.POSTERIOR_MEAN
        },
        build(choose(choices.GRIDS, grid, "grid")),
        BUDGETS,
    )
    table = convergence.convergence_table(found, BUDGETS)
    return {
        "convergence.md": table.encode(),
        "convergence.png": convergence.convergence_plot(found),
    }


def cost_table(batch_size: int, path: ProcessPath, named: Mapping[str, Solver]) -> bytes:
    """Formats each solver's own share of the time as a Markdown table."""
    shape = (batch_size, 32, 32, 4)
    network = DiT(num_classes=0, **SIZES["DiT-S/2"].settings)
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros(shape), jnp.zeros(batch_size))
    fixed = {name: solver for name, solver in named.items() if solver.nfe is not None}
    shares = solver_costs(lambda x, t: network.apply(params, x, t), path, fixed, shape)  # pyright: ignore[reportArgumentType]
    rows = [f"| `{name}` | {100 * share:.1g} % |\n" for name, share in shares.items()]
    head = "| solver | own arithmetic / network evaluations |\n| --- | --- |\n"
    return (head + "".join(rows)).encode()


USAGE = f"""{__doc__}
Paths: {", ".join(choices.PATHS)}
Grids: {", ".join(choices.GRIDS)}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
