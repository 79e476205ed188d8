r"""Compare runs on held-out images: their error by log-SNR, in the space of any target.

  python -m experiments.validate --workdirs=runs/digits,runs/digits-ddpm --space=noise,clean,v

Runs may differ in path, target, weight and network, but not in data. All are evaluated on the same
images with the same noise at the same log-SNRs. Prints one table per space and writes
validation.json to each run's folder, or to --out.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
from absl import flags

import diffjax
from diffjax import choices
from diffjax.data import DataSet, all_examples
from diffjax.errors import UserError
from diffjax.host.files import write_json
from diffjax.host.progress import progress
from diffjax.runs.load import Run
from diffjax.runs.measuring.results import elsewhere, file_of
from diffjax.spec import build, choose
from diffjax.studies import validation
from diffjax.studies.validation import ValidationLoss
from diffjax.training.sharding import batch_sharding
from experiments.flags import cli

FLAGS = flags.FlagValues()
flags.DEFINE_list("workdirs", None, "folders of the runs", flag_values=FLAGS)
cli.define_step(FLAGS)
flags.DEFINE_list("space", ["noise", "clean", "v"], "targets of the errors", flag_values=FLAGS)
flags.DEFINE_string("space_path", "cosine", "path that defines v and velocity", flag_values=FLAGS)
flags.DEFINE_integer("num_images", 500, "number of test images", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "seed of noise and log-SNRs", flag_values=FLAGS)
flags.DEFINE_string("weights", None, "live, or an average such as ema-0.999", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 128, "images per batch", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string(
    "out", None, "folder for the results, of several runs with a folder for each (--workdirs)",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("plot", None, "write a plot to this .png", flag_values=FLAGS)
flags.DEFINE_string("data_path", None, "new path of the data, if moved", flag_values=FLAGS)
flags.DEFINE_list(
    "allowed_packages", [], "your packages that the saved configs may name", flag_values=FLAGS
)


def main(args: SimpleNamespace) -> None:
    """Evaluates all runs, prints the tables, and writes the files."""
    cli.require(args, "workdirs")
    spaces = {name: build(choose(choices.TARGETS, name, "target")) for name in args.space}
    space_path = build(choose(choices.PATHS, args.space_path, "path"))
    if not spaces:
        raise UserError(f"--space is empty; choose from {', '.join(choices.TARGETS)}")
    if args.plot is not None and Path(args.plot).suffix != ".png":
        raise UserError(f"--plot={args.plot} should end in .png")
    allowed = ("diffjax", *args.allowed_packages)
    how = {"step": args.step, "weights": args.weights, "allowed_packages": allowed}
    runs, dataset = load_runs(args.workdirs, args.data_path, **how)
    places = runs if args.out is None else in_folder(runs, Path(args.out))
    batch = all_examples(dataset.test, args.num_images)
    images = batch["image"]
    losses = {}
    for name, run in runs.items():
        print(f"{name}: {len(images)} images", file=sys.stderr)
        model = run.model(args.weights)
        with progress(f"measuring the losses of {name}"):
            losses[name] = validation.loss_by_log_snr(
                model.predict(),
                run.parts.wired.path,
                images,
                run.parts.wired.condition.of_batch(batch),
                jax.random.key(args.seed),
                spaces=spaces,
                space_path=space_path,
                batch_size=args.batch_size,
                place=batch_sharding(model.mesh),
            )
    print("\n\n".join(validation.loss_table(losses, space) for space in spaces))
    for name, run in runs.items():
        provenance = {
            "step": run.step,
            "weights": args.weights or run.config.weights,
            "data": dataset.name,
            "split": "test",
            "test_sha256": dataset.test.fingerprint(),
            "seed": args.seed,
            "space_path": args.space_path,
        }
        _write(places[name], provenance | validation.losses_as_json(losses[name]))
    print(f"validation.json in {', '.join(str(each.workdir) for each in places.values())}")
    if args.plot is not None:
        _save(Path(args.plot), losses)


def load_runs(
    workdirs: Sequence[str], data_path: str | None, **how: Any
) -> tuple[dict[str, Run], DataSet]:
    """Loads the runs by their folders, and the data on which all of them were trained.

    `how` is as in `diffjax.load`.

    Raises:
        UserError: a folder is listed twice or contains no run, or a run was trained on other data
            or on images that are not mixed with independent noise.
    """
    runs: dict[str, Run] = {}
    dataset: DataSet | None = None
    for workdir in workdirs:
        if workdir in runs:
            raise UserError(f"--workdirs has {workdir} twice")
        run = diffjax.load(workdir, **how)
        if reason := validation.unfit(run.parts.wired.objective.traits):
            raise UserError(f"{workdir} {reason}")
        own = run.dataset(data_path)
        dataset = dataset or own
        if own.test.fingerprint() != dataset.test.fingerprint():
            raise UserError(
                f"{workdir} ({own.name}) has other test images than {workdirs[0]} "
                f"({dataset.name}): only runs on the same data can be compared"
            )
        runs[workdir] = run
    if dataset is None:
        raise UserError("--workdirs is empty; set it to folders of runs")
    return runs, dataset


def in_folder(runs: Mapping[str, Run], out: Path) -> dict[str, Run]:
    """The runs with their results in a folder; several of them in folders of their names there.

    Raises:
        UserError: two have one name, or the folder has another run.
    """
    if len(runs) == 1:
        return {name: elsewhere(run, out) for name, run in runs.items()}
    names = [run.workdir.resolve().name for run in runs.values()]
    if len(set(names)) < len(names):
        raise UserError(f"--out={out}: two of the runs are called {max(names, key=names.count)}")
    return {
        place: elsewhere(run, out / name)
        for (place, run), name in zip(runs.items(), names, strict=True)
    }


def _write(run: Run, content: dict[str, Any]) -> None:
    path = file_of(run.workdir, "validation.json", run.step)
    try:
        write_json(path, content)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error


def _save(out: Path, losses: dict[str, ValidationLoss]) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(validation.plot_losses(losses))
    except OSError as error:
        raise UserError(f"can't write {out}: {error.strerror}") from error
    print(f"plot in {out}")


USAGE = f"""{__doc__}
Spaces: {", ".join(choices.TARGETS)}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
