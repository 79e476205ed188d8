r"""Measure a trained run beside its samples: loss by log-SNR, effective weight, gradient noise.

  python -m experiments.probe --workdir=runs/digits

On held-out images, the same for all runs, with the same noise. Writes probes.json into the run's
folder, from which experiments.report draws its plots.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

from absl import flags

from diffjax.runs.probe import probe_run
from experiments import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
flags.DEFINE_integer("num_images", 256, "of the test set", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "of noise, log-SNRs and examples", flag_values=FLAGS)
flags.DEFINE_string("data_path", None, "where the data lie now, if moved", flag_values=FLAGS)
flags.DEFINE_list(
    "allowed_packages", [], "of your own, that the saved config may name", flag_values=FLAGS
)


def main(args: SimpleNamespace) -> None:
    """Measures the run and names the file."""
    cli.require(args, "workdir")
    allowed = ("diffjax", *args.allowed_packages)
    path = probe_run(
        Path(args.workdir),
        num_images=args.num_images,
        seed=args.seed,
        data_path=args.data_path,
        allowed_packages=allowed,
    )
    print(path)


USAGE = __doc__ or ""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
