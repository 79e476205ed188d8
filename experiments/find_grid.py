r"""Optimise a solver's time grid for a trained model, and store it in the run's folder.

  python -m experiments.find_grid --workdir=runs/digits --solver=ddim --num_steps=5,10
  python -m experiments.evaluate --workdir=runs/digits --solvers=ddim --grids=uniform,found \
      --num_steps=5,10

Writes WORKDIR/grids/SOLVER_N.json, which --grid=found reads; with --out=OUT OUT/grids, which
experiments.evaluate --out=OUT reads. Flags that are not set have the
values of the run's config. Prints the times, and for each grid the root mean square distance
between its samples and those of an accurate solver, for noise that the search did not use.
"""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
from absl import flags

import diffjax
from diffjax import choices
from diffjax.conditions.base import len_of
from diffjax.errors import UserError
from diffjax.evaluation.tables import three_digits as written
from diffjax.host.files import write_json
from diffjax.host.progress import progress
from diffjax.runs.load import Run
from diffjax.runs.measuring.evaluated_samples import labels_in_mix, wanted_samples
from diffjax.runs.samples.found_grids import FOUND, Search, grid_file, prepare
from diffjax.runs.samples.model import Request
from diffjax.runs.samples.recipes import Chosen, named_recipe
from diffjax.spec import build, choose
from experiments.evaluate import of_first_folder, parse_steps
from experiments.flags import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder for the results (--workdir)", flag_values=FLAGS)
flags.DEFINE_string("solver", None, "solver of the grid", flag_values=FLAGS)
flags.DEFINE_list("num_steps", None, "comma-separated numbers of steps", flag_values=FLAGS)
flags.DEFINE_integer("num_samples", 64, "samples of the search", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("guidance_scale", None, "guidance scale; 1 is off", flag_values=FLAGS)
flags.DEFINE_string("guidance", None, "guidance rules, joined by +", flag_values=FLAGS)
flags.DEFINE_string("against", None, "weaker model of the guidance", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "seed of the noise", flag_values=FLAGS)
flags.DEFINE_string("weights", None, "live, or an average such as ema-0.999", flag_values=FLAGS)
flags.DEFINE_string("teacher", "rk4", "the accurate solver", flag_values=FLAGS)
flags.DEFINE_integer(
    "num_candidates", 64, "times to choose from", lower_bound=2, upper_bound=10_000,
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("batch_size", 16, "samples at a time", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string(
    "labels", None, "data (in its proportions), balanced, or classes in turn, as 3,7",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("data_path", None, "where the data lie now, if moved", flag_values=FLAGS)
flags.DEFINE_list(
    "allowed_packages", [], "your packages that the saved config may name", flag_values=FLAGS
)


def main(args: SimpleNamespace) -> None:
    """Searches grids, saves them, and prints a table of their errors."""
    cli.require(args, "workdir")
    allowed = ("diffjax", *args.allowed_packages)
    run = diffjax.load(args.workdir, weights=args.weights, allowed_packages=allowed)
    if args.out is not None:
        run = of_first_folder(run, args.out)
    chosen = Chosen(
        args.solver,
        guidance_scale=args.guidance_scale,
        guidance=args.guidance,
        against=args.against,
    )
    named = named_recipe(run, chosen)
    given = args.num_steps or [str(run.recipe.num_steps)]
    steps = [parse_steps(text) for text in given]
    if max(steps) > args.num_candidates:
        raise UserError(f"{max(steps)} steps need at least as many candidates: --num_candidates")
    teacher = build(choose(choices.SOLVERS, args.teacher, "teacher"))
    labels = labels_in_mix(run, args.num_samples, args.labels, args.data_path)
    # As many again to test the found grids, with the same labels.
    labels, wired = np.concatenate([labels, labels]), run.parts.wired
    samples = wanted_samples(wired, lambda: run.dataset(args.data_path), labels)
    with progress("sampling accurately and measuring the error of each jump between two times"):
        search = prepare(
            run.model(args.weights),
            named.recipe,
            teacher,
            Request(samples.condition, args.seed, samples.source),
            num_candidates=args.num_candidates,
            batch_size=args.batch_size,
        )
    how = {
        "solver": named.solver,
        "path": type(run.parts.wired.path).__name__,
        "step": run.step,
        "weights": args.weights or run.config.weights,
        "guidance_scale": named.recipe.guidance_scale,
        "guidance": repr(named.recipe.guidance),
        "against": repr(named.recipe.against),
        "seed": args.seed,
        "num_samples": len_of(samples.condition) // 2,
        "teacher": args.teacher,
        "num_candidates": args.num_candidates,
    }
    table: dict[str, list[str]] = {}
    for n in steps:
        with progress(f"finding a grid of {n} steps"):
            content = find(run, search, named.grid, n)
        save(run, named.solver, n, {**how, **content})
        for name, error in content["end_errors"].items():
            table.setdefault(name, []).append(written(error))
    widths = [max(len(name) for name in table), *(max(9, len(f"{n} steps")) for n in steps)]
    for name, cells in {"grid": [f"{n} steps" for n in steps], **table}.items():
        columns = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join([name.ljust(widths[0]), *columns]))


def find(run: Run, search: Search, own: str, n: int) -> dict[str, Any]:
    """Finds the grid of n steps, and compares it and the named grids with the teacher."""
    found = search.find(n)
    named = {name: build(row) for name, row in choices.GRIDS.items()}
    tried = {FOUND: found, own: run.recipe.grid, **named}
    errors = {name: search.distances(grid, n, True) for name, grid in tried.items()}
    return {
        "num_steps": n,
        "times": [*found.times, 0.0],
        "predicted_error": search.predicted(found),
        "end_errors": {name: e if np.isfinite(e) else None for name, e in errors.items()},
    }


def save(run: Run, solver: str, n: int, content: dict[str, Any]) -> None:
    """Writes a grid to its file, and prints the path and the times."""
    file = grid_file(run.workdir, solver, n)
    try:
        file.parent.mkdir(exist_ok=True)
        write_json(file, content)
    except OSError as error:
        raise UserError(f"can't write {file}: {error.strerror}") from error
    print(f"{file}: {', '.join(f'{t:.4g}' for t in content['times'])}")


USAGE = f"""{__doc__}
Solvers:
{cli.describe_solvers()}
Guidance: {", ".join(choices.GUIDANCE)}; joined by +, the innermost first"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
