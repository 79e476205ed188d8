r"""Train a model, evaluate it, and write a page about it.

  python -m experiments.train --config=configs/digits.py
  python -m experiments.train --config=configs/digits.py:objective=ddpm,model=unet \
      --config.optimizer.learning_rate=3e-4

The same command again goes on where it stopped, or says that the run is finished.
"""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

from absl import flags

from diffjax import choices
from diffjax.data import DataSet
from diffjax.evaluation.run_files import read_json
from diffjax.evaluation.tables import measure, percent
from diffjax.spec import build, to_json
from diffjax.training import workdirs
from diffjax.training.loop import train
from diffjax.training.measure import check_evaluation
from diffjax.training.processes import is_first
from diffjax.training.setup import Setup, check_pairs, set_up
from diffjax.training.watchdog import Watchdog
from experiments import cli, processes

FLAGS = flags.FlagValues()
cli.define_config(FLAGS)
flags.DEFINE_string("workdir", None, "folder of the run; runs/NAME by default", flag_values=FLAGS)
flags.DEFINE_bool("print_config", False, "print the resolved config and stop", flag_values=FLAGS)
flags.DEFINE_bool(
    "dry_run", False, "build and check everything, say what would run, and stop", flag_values=FLAGS
)
flags.DEFINE_float(
    "hang_seconds", Watchdog.seconds, "without a step that are a hang; 0 never",
    lower_bound=0.0, flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_float(
    "hang_times", Watchdog.times, "and no less than that many times a step's time",
    lower_bound=0.0, flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_bool(
    "hang_exits", Watchdog.exits, "end a run that hangs, with status 75; else only tell",
    flag_values=FLAGS,
)  # fmt: skip
processes.define(FLAGS)


def main(args: SimpleNamespace) -> None:
    """Trains, or prints what would be trained."""
    config = args.config
    workdir = Path(args.workdir or Path("runs") / config.name)
    if args.print_config:
        print(to_json(config), end="")
        return
    if args.dry_run:
        dataset = build(config.data)
        setup = set_up(config, dataset.image_shape, dataset.num_classes)
        check_pairs(setup, dataset)
        check_evaluation(config, dataset.image_shape)
        print(describe(setup, dataset, workdir))
        return
    command = shlex.join(["python", "-m", "experiments.train", *sys.argv[1:]])
    watchdog = Watchdog(args.hang_seconds, args.hang_times, args.hang_exits)
    page = train(config, workdir, command, watchdog=watchdog)
    if not is_first():
        return
    print(f"{headline(workdir)}\nopen {page}")


def describe(setup: Setup, dataset: DataSet, workdir: Path) -> str:
    """What a dry run says."""
    config, wired = setup.config, setup.wired
    epochs = config.num_steps * config.batch_size / len(dataset.train)
    shape = "x".join(map(str, dataset.image_shape))
    rows = {
        "data": f"{dataset.name}: {len(dataset.train):,} images of {shape}, "
        f"{dataset.num_classes or 'no'} classes; {len(dataset.test):,} for testing",
        "network": f"{type(wired.network).__name__}, {wired.num_params:,} parameters",
        "path": repr(wired.path),
        "predicts": type(wired.precond.target).__name__,
        "weight": repr(build(config.objective.weight)),
        "times": repr(build(config.objective.times)),
        "training": f"{config.num_steps:,} steps of {config.batch_size} images, "
        f"{epochs:,.1f} epochs",
        "mesh": ", ".join(f"{axis}={size}" for axis, size in setup.mesh.shape.items()),
        "sampling": f"{config.sampling.num_steps} steps, {wired.recipe.nfe} network evaluations "
        f"per sample",
        "workdir": str(workdir),
    }
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    return "\n".join([*lines, "all of it fits together; nothing was trained or written"])


def headline(workdir: Path) -> str:
    """The result in one line."""
    result = read_json(workdir / workdirs.EVALUATION) or {}
    distance = result["frechet_distance"]
    accuracy = result["accuracy"]
    recognised = "" if accuracy is None else f"{percent(accuracy)} recognised as their label, "
    return (
        f"{result['num_samples']:,} samples: {recognised}"
        f"Fréchet distance {measure(distance['value'])} (floor {measure(distance['floor'])}), "
        f"{result['sampling']['nfe']} network evaluations per sample"
    )


USAGE = f"""{__doc__}
Configs (--config=configs/NAME.py): {", ".join(cli.config_names())}
Arguments after the colon, comma-separated:
  objective=  {", ".join(choices.OBJECTIVES)}
  model=      dit, unet; configs may offer more
{cli.describe_tables({**choices.AXES, "wrappers": choices.WRAPPERS})}
Wrappers are joined by +, the innermost first.
Solvers, for experiments.sample and experiments.evaluate, whose --help says what they are:
  {", ".join(choices.SOLVERS)}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
