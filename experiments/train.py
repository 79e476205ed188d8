r"""Train a model, evaluate it, and write its report.

  python -m experiments.train --config=configs/digits.py
  python -m experiments.train --config=configs/digits.py:objective=ddpm,model=unet \
      --config.optimizer.learning_rate=3e-4

  python -m experiments.train --config=configs/digits.py --config.num_steps=2400 --extend

  python -m experiments.train --config=configs/imagenet256.py --auto

The same command resumes an interrupted run, or reports that the run is finished; --extend makes a
run longer; --auto chooses mesh, compute type and parts of the batch for the devices.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import jax
from absl import flags
from ml_collections import ConfigDict

from diffjax import choices
from diffjax.data import DataSet
from diffjax.data.fingerprints import evenly
from diffjax.defaults import seen_too_often, suiting_steps
from diffjax.errors import UserError
from diffjax.evaluation.tables import percent, three_digits
from diffjax.host.processes import is_first
from diffjax.host.progress import progress
from diffjax.host.run_files import read_json
from diffjax.loop.begin import initial_weights
from diffjax.loop.loop import prepared, train
from diffjax.loop.profile import Profile
from diffjax.models import DiT
from diffjax.performance.planning import fitting
from diffjax.performance.planning.search import changed
from diffjax.runs import workdirs
from diffjax.runs.extension import planned
from diffjax.runs.measuring.measure import own_extractor
from diffjax.runs.samples.recipes import name_in
from diffjax.runs.setup import Setup
from diffjax.spec import TARGET, build, to_json
from diffjax.wiring import Wired
from experiments.flags import cli, shared

MANY_STEPS = 20_000
"""From here on, nothing is known to be too few."""

FLAGS = flags.FlagValues()
cli.define_config(FLAGS)
flags.DEFINE_string("workdir", None, "folder of the run; runs/NAME by default", flag_values=FLAGS)
flags.DEFINE_bool("print_config", False, "print the resolved config and stop", flag_values=FLAGS)
flags.DEFINE_bool(
    "dry_run", False, "build and check everything, print a summary, and stop", flag_values=FLAGS
)
flags.DEFINE_bool(
    "auto", False, "choose mesh, compute type, rematerialisation and parts of the batch for this "
    "machine by plan, and print them; settings on the command line stay (docs/devices.md)",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
    "profile_steps", None, "first and last step to trace to WORKDIR/profile, such as 10:13",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
    "compilation_cache", None, "folder of compiled programs, for quick starts; by default "
    "JAX_COMPILATION_CACHE_DIR or ~/.cache/diffjax", flag_values=FLAGS,
)  # fmt: skip
shared.define_extend(FLAGS)
shared.define_processes(FLAGS)
shared.define_watchdog(FLAGS)


def main(args: SimpleNamespace) -> None:
    """Trains a run, or prints its config or summary."""
    config = args.config
    workdir = Path(args.workdir or Path("runs") / config.name)
    if args.auto:
        config = for_this_machine(config, workdir, args.given)
    profile = parse_steps(args.profile_steps)
    profile.check(config.num_steps)
    if args.print_config:
        print(to_json(config), end="")
        return
    if args.dry_run:
        with progress("reading the data and checking that all parts fit"):
            summary = describe(*prepared(config), workdir, extend=args.extend)
        print(summary)
        return
    if args.compilation_cache is not None:
        cli.keep_compiled_programs(args.compilation_cache)
    command = shlex.join(["python", "-m", "experiments.train", *sys.argv[1:]])
    watchdog = shared.watchdog(args)
    try:
        page = train(
            config, workdir, command, extend=args.extend, watchdog=watchdog, profile=profile
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(out_of_memory(config)) from error
    if not is_first():
        return
    print(f"{headline(workdir)}\nopen {page}")


def for_this_machine(config: ConfigDict, workdir: Path, given: Sequence[str]) -> ConfigDict:
    """The config with the settings that suit the devices; prints them and why.

    A run that exists goes on as it began, but for its mesh.

    Raises:
        UserError: it fits by no settings.
    """
    devices = jax.devices()
    begun = read_json(workdir / workdirs.CONFIG) or {}
    values = {}
    for name in fitting.SETTINGS[1:]:
        *groups, key = name.split(".")
        group = begun.get(groups[0], {}) if groups else begun
        if key in group and f"config.{name}" not in given:
            values[name.replace(".", "__")] = group[key]
    if values:
        given = [*given, *(f"config.{name.replace('__', '.')}" for name in values)]
        print(f"auto: {', '.join(values).replace('__', '.')}: as {workdir} began", file=sys.stderr)
    found = fitting.fitted(
        changed(config, **values),
        fitting.attached(devices),
        bfloat16=fitting.multiplies_bfloat16(devices[0]),
        given=given,
    )
    for name, reason in found.reasons.items():
        print(f"auto: {name}={reason}", file=sys.stderr)
    return found.config.lock()


def out_of_memory(config: ConfigDict) -> str:
    """A one-line error for a run that does not fit into memory, with settings to try.

    Example:
        >>> config = ConfigDict({"batch_size": 256, "model": {}, "mesh": {"fsdp": 8}})
        >>> print(out_of_memory(config))
        out of memory at batch_size=256: try --config.accumulation_steps=2, or a smaller
        --config.batch_size; python -m experiments.plan finds what fits
    """
    would = [f"--config.accumulation_steps={2 * config.get('accumulation_steps', 1)}"]
    if config.model.get("remat", "full") != "full":
        would.append("--config.model.remat=full")
    if config.mesh.fsdp == 1:
        would.append("--config.mesh.data=1 --config.mesh.fsdp=-1")
    would.append("a smaller --config.batch_size")
    return (
        f"out of memory at batch_size={config.batch_size}: try {', or '.join(would)}; "
        "python -m experiments.plan finds what fits"
    )


def parse_steps(text: str | None) -> Profile:
    """Parses the first and the last step to trace.

    Raises:
        UserError: the text is not one or two integers, or they are not in order.

    Example:
        >>> parse_steps("10:13"), parse_steps("7")
        (Profile(first=10, last=13), Profile(first=7, last=7))
    """
    if text is None:
        return Profile()
    first, colon, last = text.partition(":")
    try:
        steps = int(first), int(last if colon else first)
    except ValueError:
        raise UserError(
            f"--profile_steps={text} should be the first and the last step, such as 10:13"
        ) from None
    if steps[0] < 1:
        raise UserError(f"--profile_steps={text}: steps are counted from 1")
    return Profile(*steps)


def describe(setup: Setup, dataset: DataSet, workdir: Path, *, extend: bool | str = False) -> str:
    """Formats the summary of a dry run.

    Raises:
        UserError: the folder belongs to another run, weights to begin with do not fit, or an image
            can't be read.
    """
    config, wired = setup.config, setup.wired
    extension = planned(workdir, setup, extend)
    if extension is None:
        workdirs.check_claim(workdir, config)
    initial_weights(setup.parts, workdir)
    num_read, num_images = read_some(dataset), len(dataset.train) + len(dataset.test)
    epochs = config.num_steps * config.batch_size / len(dataset.train)
    suiting = suiting_steps(len(dataset.train), config.batch_size)
    num_trained = sum(leaf.size for leaf in jax.tree.leaves(setup.abstract.params))
    trains = f", {num_trained:,} trained" if num_trained < wired.num_params else ""
    images = dataset.codec.describe(dataset.image_shape)
    rows = {
        "data": f"{dataset.name}: {len(dataset.train):,} {images}, "
        f"{dataset.condition.describe()}; {len(dataset.test):,} for testing; "
        f"{'all' if num_read == num_images else f'{num_read:,}'} were read",
        **{f"  {name}": fact for name, fact in dataset.facts.items()},
        "network": f"{type(wired.network).__name__}, {wired.num_params:,} parameters{trains}",
        "path": repr(wired.path),
        "predicts": type(wired.precond.target).__name__,
        "weight": repr(build(config.objective.weight)),
        "times": repr(build(config.objective.times)),
        "training": f"{config.num_steps:,} steps of {config.batch_size} images, "
        f"{epochs:,.1f} epochs"
        + (": each image about 2,000 times" if config.num_steps == suiting else ""),
        "mesh": ", ".join(f"{axis}={size}" for axis, size in setup.mesh.shape.items()),
        "sampling": f"{name_in(choices.SOLVERS, config.sampling.solver)}, "
        f"{config.sampling.num_steps} steps of the grid "
        f"{name_in(choices.GRIDS, config.sampling.grid)}, {wired.recipe.nfe} network evaluations "
        f"per sample, guidance {config.sampling.guidance_scale:g}",
        "metrics": describe_metrics(config, dataset),
        "workdir": str(workdir),
    }
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    if extension is not None:
        lines += [f"changes: {k}: {old} -> {new}" for k, (old, new) in extension.changes.items()]
    notes = (*dataset.notes, *note_on_steps(config, dataset), *note_on_target(config, wired))
    notes += tuple(note_on_loss(config))
    lines += [f"note: {note}" for note in notes]
    return "\n".join([*lines, "all parts fit together; nothing was trained or written"])


def describe_metrics(config: ConfigDict, dataset: DataSet) -> str:
    """What samples are measured by, with the hash of a classifier."""
    extractor = own_extractor(config, dataset)
    known = extractor.test_accuracy
    features = (
        f"{extractor.name} (sha256 {extractor.sha256[:12]}, accuracy {percent(known)})"
        if known is not None
        else extractor.name
    )
    wanted = build(config.evaluation.extractor)
    train_it = (
        "; for accuracy: python -m experiments.train_classifier with this --config"
        if wanted.of_data is not None and known is None and dataset.num_classes > 1
        else ""
    )
    return f"{config.evaluation.num_samples:,} samples, features {features}{train_it}"


def read_some(dataset: DataSet) -> int:
    """Reads at most 256 evenly spaced images of each split, and returns their number.

    Raises:
        UserError: an image can't be read.
    """
    num_read = 0
    for source in (dataset.train, dataset.test):
        for row in evenly(len(source)):
            source.gather([row])
            num_read += 1
    return num_read


def note_on_steps(config: ConfigDict, dataset: DataSet) -> list[str]:
    """A note if there are too many training steps for the number of images."""
    num_images = len(dataset.train)
    if not seen_too_often(config.num_steps, num_images, config.batch_size):
        return []
    epochs = config.num_steps * config.batch_size / num_images
    return [
        f"each of {num_images:,} images is seen {epochs:,.0f} times, where published runs on "
        "small sets see theirs 2,000 to 4,000 times: "
        f"--config.num_steps={suiting_steps(num_images, config.batch_size)} suits them"
    ]


def note_on_target(config: ConfigDict, wired: Wired) -> list[str]:
    """A note where a transformer is to learn to predict noise in few steps."""
    slow = [build(choices.TARGETS[name]) for name in choices.MODELS_OF_TARGETS]
    if wired.precond.target not in slow or not isinstance(wired.network, DiT):
        return []
    if config.num_steps > MANY_STEPS:
        return []
    return [
        "a transformer learns to predict noise in many more steps than these: leave "
        "model=... out or take model=unet, or predict v instead, with target=v (docs/recipes.md)"
    ]


def note_on_loss(config: ConfigDict) -> list[str]:
    """A note where the loss is one that needs many more steps than others."""
    loss = config.objective[TARGET]
    found = [x for name, x in choices.SLOW_LOSSES.items() if choices.LOSSES[name][TARGET] == loss]
    if not found or config.num_steps > MANY_STEPS:
        return []
    return [
        f"this loss needs many more steps: on digits, after as much training as 1,200 steps of "
        f"flow matching, it had a Fréchet distance of {found[0]:g} in one evaluation, and "
        "mean_flow 0.65 (docs/objectives.md)"
    ]


def headline(workdir: Path) -> str:
    """Formats the result of an evaluation as one line."""
    path = workdir / workdirs.EVALUATION
    result = read_json(path) or {}
    try:
        distance, accuracy = result["frechet_distance"], result["accuracy"]
        floor = distance["floor"]  # none where there are no test images
        of_real = "" if floor is None else f" (floor {three_digits(floor)})"
        recognised = "" if accuracy is None else f"{percent(accuracy)} recognised as their label, "
        return (
            f"{result['num_samples']:,} samples: {recognised}"
            f"Fréchet distance {three_digits(distance['value'])}{of_real}, "
            f"{result['sampling']['nfe']} network evaluations per sample"
        )
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a valid evaluation ({type(error).__name__}: {error}): move it "
            "away, and run the same command to make it again"
        ) from error


USAGE = f"""{__doc__}
Configs (--config=configs/NAME.py): {", ".join(cli.config_names())}
Arguments after the colon, comma-separated:
  objective=  {", ".join(choices.OBJECTIVES)}
  model=      dit, unet; configs may offer more
{
    cli.describe_tables(
        {
            **choices.AXES,
            "wrappers": choices.WRAPPERS,
            "derivative": choices.DERIVATIVES,
            **choices.TRAINING_AXES,
            "evaluators": choices.EVALUATORS,
            "trackers": choices.TRACKERS,
        }
    )
}
Wrappers are joined by +, the innermost first, and so are evaluators and trackers.
Solvers, for experiments.sample and experiments.evaluate (their --help describes them):
  {", ".join(choices.SOLVERS)}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
