r"""Make the average of a run's weights over another length, after training.

  python -m experiments.average --workdir=runs/digits --length=0.07
  python -m experiments.sample --workdir=runs/digits --weights=power-0.07

The run has to be trained with --config.ema_lengths=0.05,0.1, which stores snapshots of these
averages. docs/training.md explains lengths.
"""

import sys
from types import SimpleNamespace

from absl import flags

from diffjax.host.progress import progress
from diffjax.runs.averages import reconstruct
from experiments.flags import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
flags.DEFINE_float(
    "length", None, "relative width of the average, as 0.07", flag_values=FLAGS
)  # fmt: skip
flags.DEFINE_integer(
    "step", None, "where in training, at a snapshot (the newest)", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_list(
    "allowed_packages", [], "of your own, that the saved config may name", flag_values=FLAGS
)


def main(args: SimpleNamespace) -> None:
    """Makes the average and prints its name."""
    cli.require(args, "workdir")
    cli.require(args, "length")
    allowed = ("diffjax", *args.allowed_packages)
    with progress("making the average"):
        made = reconstruct(args.workdir, args.length, args.step, allowed_packages=allowed)
    print(
        f"{made.name}@{made.step} from {made.num_snapshots} snapshots; the error of its weights is "
        f"{100 * made.error:.2g} %"
    )


USAGE = __doc__ or ""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
