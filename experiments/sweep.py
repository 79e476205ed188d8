"""Train every cell of a sweep, with any number of workers, and write one report.

  python -m experiments.sweep --sweep=configs/sweeps/digits_objectives.py
  python -m experiments.sweep --sweep=configs/sweeps/digits_objectives.py --workers=4
  python -m experiments.sweep --sweep=configs/sweeps/digits_objectives.py --status
  python -m experiments.sweep --sweep=FILE --search=random --trials=20 --finalists=3
  python -m experiments.sweep --sweep=FILE --search=optuna --trials=40 --workers=4

Each cell is a run of experiments.train in its own folder; --extend makes all of them longer, with
--override=config.num_steps=N. All cells are built and checked
before the first one trains. The same command resumes a sweep that was stopped for any reason. It
tries a failed cell again; the cell's output is in output.txt in its folder. With several values
of config.seed the report has a verdict: which arms are worse than the best, or inconclusive.
--search trains trials that it chooses instead of all combinations, also from ranges (Between).
"""

import math
import multiprocessing
import re
import shlex
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags

from diffjax import config_files
from diffjax.comparison.results import STATUS, SWEEP, read_sweep
from diffjax.comparison.summary import compare_sweep, numbers
from diffjax.errors import UserError, nearest
from diffjax.host.files import write_json
from diffjax.host.interrupts import Interrupted, stop_signals
from diffjax.host.progress import progress
from diffjax.host.run_files import read_json
from diffjax.reports.sweep_page import write_sweep_report
from diffjax.reports.sweep_text import quality_markdown, verdict_markdown
from diffjax.runs import workdirs
from diffjax.sweeps.cells import (
    Planned,
    extend_flag,
    is_finished,
    plan_cells,
    train_cells,
)
from diffjax.sweeps.engines import ENGINES, Job, parse_options
from diffjax.sweeps.live import Live, progress_table, read_plan, rows
from diffjax.sweeps.run import run_workers
from diffjax.sweeps.search import (
    SEARCHES,
    Trial,
    adaptive_trials,
    best_trials,
    fresh_seeds,
    random_trials,
    searched_axes,
)
from diffjax.sweeps.sweep import STEPS, Cell, Sweep
from diffjax.sweeps.worker import in_subprocess, units, work
from experiments.flags import cli, shared

FLAGS = flags.FlagValues()
flags.DEFINE_string("sweep", None, "Python file with a get_sweep()", flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "folder; runs/sweeps/NAME by default", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "override",
    [],
    "a setting for all cells, for example config.data.path=FOLDER; can be repeated",
    flag_values=FLAGS,
)
shared.define_extend(FLAGS)
flags.DEFINE_bool("dry_run", False, "check all cells, list them, and stop", flag_values=FLAGS)
flags.DEFINE_bool("status", False, "show the status of all cells, and stop", flag_values=FLAGS)
flags.DEFINE_enum("engine", "local", list(ENGINES), "where workers run", flag_values=FLAGS)
flags.DEFINE_integer("workers", 1, "number of workers", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "ensemble", 1, "largest number of cells that train as one program", lower_bound=1,
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
    "slurm",
    "",
    "options for --engine=slurm, those of submitit's update_parameters: "
    "partition=gpu,timeout_min=600,gpus_per_node=1,cpus_per_task=8,mem_gb=32",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "ray",
    "",
    "options for --engine=ray: address=auto and those of a Ray task: num_cpus=4,num_gpus=1",
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "search", None, list(SEARCHES), "train trials at random, or adaptively by Optuna, instead of "
    "all combinations", flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("trials", 20, "of a search", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "search_seed", 0, "of the search; runs have config.seed", lower_bound=0, flag_values=FLAGS
)
flags.DEFINE_integer(
    "finalists", 0, "after a search, train so many of the best trials again with fresh seeds, for "
    "an unbiased comparison", lower_bound=0, flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("final_seeds", 3, "seeds of finalists", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_bool("worker", False, "run as a worker; used by engines", flag_values=FLAGS)
flags.DEFINE_string(
    "since",
    None,
    "a worker does not retry cells that failed in an attempt after this time; now by default",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "cells", [], "train these cells in this process; used by workers", flag_values=FLAGS
)


def main(args: SimpleNamespace) -> int:
    """Trains all unfinished cells, prints the results, and writes the report."""
    if args.workdir is None:
        cli.require(args, "sweep")
    workdir = Path(args.workdir or Path("runs") / "sweeps" / Path(args.sweep).stem)
    if args.status:
        print(progress_table(rows(workdir)))
        return 0
    cli.require(args, "sweep")
    sweep = config_files.returned_by(args.sweep, "get_sweep", Sweep)
    shared = overrides(args.override, sweep)
    sweep = replace(sweep, overrides={**sweep.overrides, **shared})
    if args.cells:
        errors = train_cells(
            named(read_cells(workdir, sweep), args.cells), workdir, extend=args.extend
        )
        for name, error in errors.items():
            print(f"error: {name}: {' '.join(error.split())}", file=sys.stderr)
        return 2 if errors else 0
    if args.worker:
        return be_worker(args, workdir, sweep)

    options = {"slurm": parse_options(args.slurm), "ray": parse_options(args.ray)}
    for engine, given in options.items():
        if given and engine != args.engine:
            raise UserError(f"--{engine} needs --engine={engine}, not --engine={args.engine}")
    if args.extend and (args.ensemble > 1 or args.search):
        raise UserError("--extend trains each cell by itself: leave --ensemble and --search out")
    if args.finalists and not args.search:
        raise UserError("--finalists needs --search: they are the best trials of a search")
    command = sweep_command(args, workdir, shared)
    if args.search:
        return search(args, sweep, workdir, command)
    return train_sweep(args, sweep, workdir, {"command": command})


def train_sweep(
    args: SimpleNamespace, sweep: Sweep, workdir: Path, facts: Mapping[str, Any]
) -> int:
    """Checks and trains all cells of a sweep, and concludes; returns the exit status."""
    planned = checked(sweep, args.ensemble)
    print_left_out(planned)
    if args.dry_run or not planned.cells:
        print("\n".join(f"{cell.name}: {shlex.join(cell.flags())}" for cell in planned.cells))
        return 0 if planned.cells else 2
    train_planned(args, sweep, workdir, planned, facts)
    return conclude(sweep, planned.cells, workdir)


def print_left_out(planned: Planned) -> None:
    """Prints each reason with the cells that it leaves out."""
    names: dict[str, list[str]] = {}
    for name, reason in planned.left_out.items():
        names.setdefault(reason, []).append(name)
    for reason, cells in names.items():
        print(f"left out: {', '.join(cells)}: {reason}", file=sys.stderr)


def train_planned(
    args: SimpleNamespace,
    sweep: Sweep,
    workdir: Path,
    planned: Planned,
    facts: Mapping[str, Any],
) -> None:
    """Writes the plan and trains its unfinished cells."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / SWEEP, {**plan(args.sweep, sweep, planned), **facts})
    given = parse_options({"slurm": args.slurm, "ray": args.ray}.get(args.engine, ""))
    words = worker_command(args.sweep, workdir, args.extend)
    job = Job(words, args.workers, workdir / "workers", given)
    with stop_signals() as should_stop:
        todo = units(planned.cells, planned.ensembles)
        run_workers(ENGINES[args.engine], job, todo, workdir, Live(workdir), should_stop)


def search(args: SimpleNamespace, sweep: Sweep, workdir: Path, command: str) -> int:
    """Trains the trials of a search, then its finalists; returns the exit status."""
    searched_axes(sweep)
    about = {"method": args.search, "trials": args.trials, "seed": args.search_seed}
    facts = {"command": command, "search": about}
    adaptive = SEARCHES[args.search]
    if adaptive and args.dry_run:
        print("trials of this search depend on results; these are random", file=sys.stderr)
    if args.dry_run or not adaptive:
        trials = random_trials(sweep, args.trials, args.search_seed)
        status = train_sweep(args, replace(sweep, trials=trials), workdir, facts)
        results = [] if args.dry_run else results_of(replace(sweep, trials=trials), workdir)
    else:
        status, results = search_adaptively(args, sweep, workdir, facts)
    if args.dry_run or not args.finalists or not any(value is not None for _, value in results):
        return status
    finalists = replace(
        sweep,
        axes={**sweep.axes, "config.seed": fresh_seeds(sweep, args.final_seeds)},
        trials=best_trials(results, args.finalists),
        question=f"{sweep.question} The best {args.finalists} of {len(results)} trials, with fresh "
        "seeds, which did not choose them.".strip(),
    )
    print(f"\nfinalists, with {args.final_seeds} fresh seeds:", file=sys.stderr)
    return max(status, train_sweep(args, finalists, workdir / FINALISTS, {"command": command}))


def search_adaptively(
    args: SimpleNamespace, sweep: Sweep, workdir: Path, facts: dict[str, Any]
) -> tuple[int, list[tuple[Trial, float | None]]]:
    """Asks for as many trials as there are workers, trains them, and so on.

    The trials are in `sweep.json`, so that the same command resumes the search.

    Returns:
        The exit status, and all trials with their results.

    Raises:
        UserError: the folder holds another search or sweep.
    """
    adaptive_trials(sweep, [], 0)  # Optuna is missing before anything is trained.
    before = read_json(workdir / SWEEP) or {}
    begun = before.get("search", {})
    if before and {**begun, "tried": 0, "trials": 0} != {
        **facts["search"],
        "tried": 0,
        "trials": 0,
    }:
        raise UserError(f"{workdir} holds another sweep or search: choose another --workdir")
    # Tuples are lists in JSON.
    tried: list[Trial] = [
        {axis: tuple(value) if isinstance(value, list) else value for axis, value in trial.items()}
        for trial in begun.get("tried", [])
    ]
    planned, new = Planned([], {}, {}, []), tried
    while True:
        if new:
            also = checked(replace(sweep, trials=new), args.ensemble)
            planned = Planned(
                [*planned.cells, *also.cells],
                {**planned.costs, **also.costs},
                {**planned.left_out, **also.left_out},
                [*planned.ensembles, *also.ensembles],
            )
            known = {**facts, "search": {**facts["search"], "tried": tried}}
            train_planned(args, sweep, workdir, planned, known)
        results = results_of(replace(sweep, trials=tried), workdir) if tried else []
        new = adaptive_trials(
            sweep, results, min(args.workers, args.trials - len(tried)), args.search_seed
        )
        if not new:
            break
        tried = [*tried, *new]
    print_left_out(planned)
    return conclude(sweep, planned.cells, workdir), results


def results_of(sweep: Sweep, workdir: Path) -> list[tuple[Trial, float | None]]:
    """The trials with their mean Fréchet distance over seeds; None unless all seeds have one."""
    values: dict[str, list[float]] = {}
    trials: dict[str, Trial] = {}
    for cell in sweep.cells():
        result = read_json(workdir / cell.name / workdirs.EVALUATION) or {}
        distance = (result.get("frechet_distance") or {}).get("value")
        values.setdefault(cell.arm, []).append(math.nan if distance is None else distance)
        trials[cell.arm] = {axis: v for axis, v in cell.axes.items() if axis != "config.seed"}
    means = {arm: statistics.fmean(found) for arm, found in values.items()}
    return [(trials[arm], mean if math.isfinite(mean) else None) for arm, mean in means.items()]


def checked(sweep: Sweep, most: int) -> Planned:
    """The result of `plan_cells`, computed in a subprocess.

    Building networks occupies the accelerator until the process ends, and trainings need it.
    """
    cells = len([*sweep.cells()])
    spawn = multiprocessing.get_context("spawn")
    # Only the parent process handles Ctrl-C.
    ignored = (signal.SIGINT, signal.SIG_IGN)
    with (
        progress(f"building and checking {cells} cell{'s'[: cells > 1]}"),
        ProcessPoolExecutor(1, spawn, signal.signal, ignored) as pool,
    ):
        planned = pool.submit(plan_cells, sweep, most)
        try:
            return planned.result()
        except KeyboardInterrupt:
            # The pool would wait for it to the end, and it has nothing to lose.
            for child in multiprocessing.active_children():
                child.kill()
            raise


def overrides(texts: Sequence[str], sweep: Sweep) -> dict[str, str]:
    """Parses `--override` flags such as `config.data.path=FOLDER` to settings by dotted name.

    Raises:
        UserError: a text is not of that form, or names an axis of the sweep.

    Example:
        >>> overrides(["config.num_steps=100"], Sweep("c.py", {"config.seed": (0, 1)}))
        {'config.num_steps': '100'}
    """
    for text in texts:
        name, equals, _ = text.partition("=")
        if not name.startswith("config.") or not equals:
            raise UserError(f"--override={text} is not of the form config.NAME=VALUE")
        if name in sweep.axes:
            raise UserError(f"--override={text}: {name} is an axis of this sweep")
    return dict(text.split("=", 1) for text in texts)


def sweep_command(args: SimpleNamespace, workdir: Path, shared: Mapping[str, str]) -> str:
    """The shell command that repeats this sweep."""
    words = ["python", "-m", "experiments.sweep", f"--sweep={args.sweep}", f"--workdir={workdir}"]
    if args.search:
        of_search = ("search", "trials", "search_seed", "finalists", "final_seeds")
        words += [f"--{name}={getattr(args, name)}" for name in of_search]
    words += [f"--override={name}={text}" for name, text in shared.items()]
    return shlex.join([*words, *extend_flag(args.extend)])


def plan(file: str, sweep: Sweep, planned: Planned) -> dict[str, Any]:
    """The content of `sweep.json`."""
    costs = planned.costs
    return {
        "name": Path(file).stem,
        "question": sweep.question,
        "config": sweep.config,
        "shared": {name: str(value) for name, value in sweep.overrides.items()},
        "matched": sweep.matched,
        "cells": [
            {
                "name": cell.name,
                "arm": cell.arm,
                "axes": dict(cell.axes),
                "location": cell.location,
                "overrides": dict(cell.overrides),
                "flags": cell.flags(),
                "folder": cell.name,
                "flops_per_step": costs[cell.name].flops_per_step,
                "num_steps": int(cell.overrides.get(STEPS, costs[cell.name].num_steps)),
            }
            for cell in planned.cells
        ],
        "left_out": [{"name": name, "reason": reason} for name, reason in planned.left_out.items()],
        "ensembles": [list(names) for names in planned.ensembles],
    }


def read_cells(workdir: Path, sweep: Sweep) -> list[Cell]:
    """Reads the matched cells of a sweep from its `sweep.json`.

    Raises:
        UserError: the file is damaged, or it names another config file, which would be executed,
            or a folder outside this one.
    """
    fields = ("name", "axes", "location", "overrides", "arm")
    file = workdir / SWEEP
    try:
        cells = [Cell(*(cell[field] for field in fields)) for cell in read_plan(workdir)["cells"]]
        for cell in cells:
            if cell.location.partition(":")[0] != sweep.config:
                raise UserError(
                    f"{file}: cell {cell.name} does not use {sweep.config}: delete the file and "
                    "start the sweep again"
                )
            if cell.name != re.sub(r"[/\\\0]", "", cell.name) or cell.name in ("", ".", ".."):
                raise UserError(
                    f"{file}: {cell.name!r} can't be a cell's name: delete the file and start the "
                    "sweep again"
                )
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged ({error!r}): the sweep's command writes it again"
        ) from None
    return cells


def cells_command(file: str, workdir: Path, extend: bool | str = False) -> list[str]:
    """The words of the command that trains cells, but for their names."""
    command = [sys.executable, "-m", "experiments.sweep", f"--sweep={file}"]
    return [*command, f"--workdir={workdir}", *extend_flag(extend)]


def worker_command(file: str, workdir: Path, extend: bool | str = False) -> list[str]:
    """The words of the command that starts a worker."""
    since = datetime.now(UTC).isoformat()
    return [*cells_command(file, workdir, extend), "--worker", f"--since={since}"]


def be_worker(args: SimpleNamespace, workdir: Path, sweep: Sweep) -> int:
    """Runs as a worker: trains units until none is free."""
    try:
        since = datetime.fromisoformat(args.since) if args.since else datetime.now(UTC)
    except ValueError as error:
        raise UserError(f"--since={args.since} is not a time: {error}") from None
    cells = read_cells(workdir, sweep)
    run = in_subprocess(cells_command(args.sweep, workdir, args.extend), workdir)
    with stop_signals() as should_stop:
        work(
            units(cells, read_plan(workdir)["ensembles"]),
            workdir,
            run,
            since=since,
            should_stop=should_stop,
        )
        if should_stop():
            raise Interrupted("stopped; the running trainings have saved")
    return 0


def named(cells: Sequence[Cell], names: Sequence[str]) -> list[Cell]:
    """Selects cells by name.

    Raises:
        UserError: the sweep has no cell with one of the names.
    """
    by_name = {cell.name: cell for cell in cells}
    for name in names:
        if name not in by_name:
            raise UserError(f"the sweep has no cell {name!r}; {nearest(name, by_name)}")
    return [by_name[name] for name in names]


def conclude(sweep: Sweep, cells: Sequence[Cell], workdir: Path) -> int:
    """Prints the findings and the failed cells, and writes the report; returns the exit status."""
    failed = [cell for cell in cells if not is_finished(cell, workdir / cell.name)]
    for cell in failed:
        error = (read_json(workdir / cell.name / STATUS) or {}).get("error", "")
        print(f"failed: {cell.name}: {error}; see its output.txt", file=sys.stderr)
    print(f"{findings(sweep, workdir)}\nopen {write_sweep_report([workdir])}")
    return 2 if failed else 0


def findings(sweep: Sweep, workdir: Path) -> str:
    """The results of a sweep as Markdown: the verdict, then each arm at each sampling cost."""
    files = read_sweep([workdir])
    content = numbers(files)
    parts = [
        sweep.question,
        f"Matched in {sweep.matched}. {content['rule']}",
        verdict_markdown(content["verdict_rows"]),
    ]
    if any(row["mean"] is not None for row in content["verdict_rows"]):
        results = {run.name: run.evaluation for run in files.runs}
        parts.append(quality_markdown(compare_sweep(files, results)))
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


FINALISTS = "finalists"
"""The folder of a search in which its finalists are a sweep."""
USAGE = __doc__ or ""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
