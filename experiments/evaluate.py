r"""Evaluate a trained run, or samples of other code: quality against network evaluations.

  python -m experiments.evaluate --workdir=runs/digits --solvers=ddim,heun \
      --num_steps=1,2,5,10,20,50
  python -m experiments.evaluate --samples=theirs.npz --config=configs/digits.py --out=runs/theirs

Writes evaluation.json and report.html to the run's folder, or to --out. Flags that are not set have
the values of the run's config. All combinations of lists are evaluated; the run's own recipe has
the first guidance scale, weights and seed. With --step the page shows quality against training
step. --samples are compared with the data of --config or --workdir.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from diffjax.config_files import check_size
from diffjax.data import DataSet
from diffjax.errors import UserError, whole_number
from diffjax.evaluation.extractors.features import Extractor
from diffjax.evaluation.extractors.named import extractor_called
from diffjax.evaluation.tables import metrics_table, quality_table
from diffjax.host.interrupts import stop_signals
from diffjax.host.processes import in_first, is_first, translate_lost_processes
from diffjax.host.progress import progress
from diffjax.host.storage import make_writable
from diffjax.host.watchdog import watched
from diffjax.reports.run_page import write_report
from diffjax.runs import workdirs
from diffjax.runs.checks import check_config
from diffjax.runs.load import Run
from diffjax.runs.measuring.foreign_samples import measure_samples
from diffjax.runs.measuring.measure import Wanted, measure, own_extractors
from diffjax.runs.measuring.results import elsewhere
from diffjax.spec import build
from experiments.flags import cli, published, shared

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run, or for results", flag_values=FLAGS)
flags.DEFINE_string(
    "samples", None, "folder of images, or .npz with arr_0, to be evaluated", flag_values=FLAGS
)
flags.DEFINE_string("out", None, "folder for the results (--workdir)", flag_values=FLAGS)
cli.define_config(FLAGS, optional=True)
published.define(FLAGS)
cli.define_steps(FLAGS)
flags.DEFINE_list("solvers", None, "comma-separated names", flag_values=FLAGS)
flags.DEFINE_list("grids", None, "comma-separated names", flag_values=FLAGS)
flags.DEFINE_list("num_steps", None, "comma-separated numbers of steps", flag_values=FLAGS)
flags.DEFINE_integer("num_samples", None, "samples per recipe", lower_bound=3, flag_values=FLAGS)
flags.DEFINE_string(
    "labels", None, "data (its proportions), balanced, or classes in turn, as 3,7",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
    "prompts", None, "@FILE of texts that samples show in turn, or one text, for labels",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("batch_size", None, "samples per batch", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_list("guidance_scale", None, "comma-separated; 1 is off", flag_values=FLAGS)
flags.DEFINE_string("guidance", None, "guidance rules, joined by +", flag_values=FLAGS)
flags.DEFINE_string("against", None, "weaker model of the guidance", flag_values=FLAGS)
flags.DEFINE_list(
    "seed",
    None,
    "comma-separated seeds; each training seed has noise of its own",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "weights", None, "comma-separated: live, or averages such as ema-0.999", flag_values=FLAGS
)
flags.DEFINE_list("extractor", None, "comma-separated extractors of features", flag_values=FLAGS)
flags.DEFINE_list(
    "extractor_weights",
    None,
    "file of its weights: a path, or a URL to download; one or several",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "extractor_sha256",
    None,
    "hash of that file, if it is not the published one",
    flag_values=FLAGS,
)
flags.DEFINE_string("data_path", None, "new path of the data, if moved", flag_values=FLAGS)
flags.DEFINE_list(
    "allowed_packages", [], "your packages that the saved config may name", flag_values=FLAGS
)

shared.define_processes(FLAGS)
shared.define_watchdog(FLAGS)

_OF_DRAWING = (
    "step", "pretrained", "lora", "solvers", "grids", "num_steps", "num_samples", "labels",
    "prompts", "batch_size", "guidance_scale", "guidance", "against", "seed", "weights",
)  # fmt: skip


def main(args: SimpleNamespace) -> None:
    """Evaluates the run, prints the table, and prints the path of the report."""
    if args.samples is not None:
        _evaluate_samples(args)
        return
    if args.config is not None:
        raise UserError("--config is of the data of --samples; a run has its own: leave it out")
    cli.require(args, "workdir")
    for name in ("guidance_scale", "seed", "weights"):
        if getattr(args, name) == []:
            raise UserError(f"--{name} is empty; leave it out for that of the run's config")
    steps = None if args.num_steps is None else [parse_steps(text) for text in args.num_steps]
    scales, seeds = numbers(args, "guidance_scale", float), numbers(args, "seed", int)
    extractors = chosen_extractors(args)
    if args.lora and args.pretrained is None:
        raise UserError("--lora goes with --pretrained: the evaluation of a run is of its weights")
    if args.out is not None and args.pretrained is not None:
        raise UserError("--out: results of --pretrained go to --workdir, leave it out")
    checkpoints, args.step = args.step, args.step[0] if isinstance(args.step, list) else None
    if checkpoints is not None and args.pretrained is not None:
        raise UserError("--step is of a run: a published file has one set of weights")
    run = published.opened(args, (args.weights or [None])[0])
    # Step 0 is that of random weights.
    chosen = checkpoints if isinstance(checkpoints, list) else [step for step in run.steps if step]
    runs = [run] if checkpoints is None else [run.at(step) for step in chosen]
    if args.out is not None:
        runs = [of_first_folder(each, args.out) for each in runs]
    run = runs[-1]
    in_first(lambda: make_writable(run.workdir))  # Fails before the work, if it does.
    with (
        translate_lost_processes(),
        stop_signals() as should_stop,
        watched(shared.watchdog(args), run.workdir, what="batch") as begun,
    ):
        dataset = run.dataset(args.data_path)
        published.record(run, dataset)
        wanted = Wanted(
            solvers=args.solvers,
            grids=args.grids,
            num_steps=steps,
            num_samples=args.num_samples,
            labels=args.labels,
            prompts=args.prompts,
            batch_size=args.batch_size,
            guidance_scales=scales,
            guidance=args.guidance,
            against=args.against,
            seeds=seeds,
            weights=args.weights,
            extractors=extractors,
        )
        for each in runs:
            how = {"should_stop": should_stop, "begun": begun, "report": _print_row}
            result = measure(each, dataset, wanted, **how)
            if is_first():
                table = quality_table(result["by_nfe"])
                print(table if len(runs) == 1 else f"step {each.step:,}\n{table}")
    if not is_first():
        return
    with progress("writing the report"):
        page = write_report(run.workdir)
    print(f"open {page}")


def _print_row(row: Mapping[str, Any]) -> None:
    text = f"{row['solver']}, {row['grid']}, {row['num_steps']} steps: {row['seconds']:.1f} s"
    print(text, file=sys.stderr)


def _evaluate_samples(args: SimpleNamespace) -> None:
    """Evaluates the samples of `--samples`, and prints the numbers and the path of the page."""
    for name in _OF_DRAWING:
        if getattr(args, name) not in (None, []):
            raise UserError(f"--{name} is of samples that are drawn: --samples are there already")
    cli.require(args, "out")
    config, dataset = _compared_with(args)
    extractors = chosen_extractors(args) or own_extractors(config, dataset)
    with progress("evaluating the samples"):
        result = measure_samples(args.samples, dataset, extractors, args.out)
    print(metrics_table(result))
    print(f"open {write_report(args.out)}")


def _compared_with(args: SimpleNamespace) -> tuple[ConfigDict, DataSet]:
    """The config and the real images of `--config`, or of the run in `--workdir`."""
    if (args.config is None) == (args.workdir is None):
        raise UserError("--samples are compared with the data of --config, or of a run: --workdir")
    if args.config is None:
        workdir = Path(args.workdir)
        config = workdirs.read_parts(workdir, ("diffjax", *args.allowed_packages)).config
        return config, workdirs.data_of(workdir, config.data, args.data_path)
    if args.data_path is not None:
        raise UserError("--data_path is of a run; of --config it is --config.data.path")
    check_config(args.config)
    return args.config, build(args.config.data, DataSet, "config.data")


def of_first_folder(run: Run, folder: str) -> Run:
    """The run with its results in a folder, which the first of several processes makes."""
    in_first(lambda: elsewhere(run, folder))
    return replace(run, workdir=Path(folder))


def chosen_extractors(args: SimpleNamespace) -> list[Extractor] | None:
    """Builds the extractors of `--extractor`; None means those of the run's config.

    With several extractors, `--extractor_weights` has one file for each, or one file for all.
    """
    names: list[str] | None = args.extractor
    given = {"weights": args.extractor_weights, "sha256": args.extractor_sha256}
    if not names:
        if any(given.values()):
            raise UserError("--extractor_weights and --extractor_sha256 need --extractor=NAME")
        return None
    for key, texts in given.items():
        if texts and len(texts) not in (1, len(names)):
            raise UserError(
                f"--extractor_{key} needs one value, or {len(names)}, as many as --extractor"
            )
    each = {key: texts * len(names) if texts and len(texts) == 1 else texts
            for key, texts in given.items()}  # fmt: skip
    return [
        extractor_called(name, **{key: texts[i] or None for key, texts in each.items() if texts})
        for i, name in enumerate(names)
    ]


def numbers(args: SimpleNamespace, name: str, kind: Callable[[str], float]) -> list[Any] | None:
    """Parses the comma-separated numbers of a flag; None if the flag is not set."""
    texts: list[str] | None = getattr(args, name)
    if texts is None:
        return None
    try:
        values = [kind(text) for text in texts]
    except ValueError as error:
        raise UserError(f"--{name} needs numbers, not {','.join(texts)!r}") from error
    check_size(f"--{name}", values)
    return values


def parse_steps(text: str) -> int:
    """Parses a number of steps."""
    steps = whole_number(text)
    if not steps:
        raise UserError(f"--num_steps needs integers from 1, not {text!r}")
    check_size("--num_steps", steps)
    return steps


USAGE = f"""{__doc__}
{cli.describe_sampling()}
{cli.AGAINST}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
