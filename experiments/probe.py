r"""Probe a trained run without samples: loss by log-SNR, effective weight, gradient noise.

  python -m experiments.probe --workdir=runs/digits

It uses held-out images with the same noise for all runs. Writes probes.json to the run's folder, or
to --out; experiments.report plots it.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

from absl import flags

from diffjax.runs.measuring.probe import probe_run
from experiments.flags import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder for the results (--workdir)", flag_values=FLAGS)
flags.DEFINE_integer("num_images", 256, "number of test images", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "seed of noise, log-SNRs and examples", flag_values=FLAGS)
flags.DEFINE_string("data_path", None, "new path of the data, if moved", flag_values=FLAGS)
flags.DEFINE_list(
    "allowed_packages", [], "your packages that the saved config may name", flag_values=FLAGS
)


def main(args: SimpleNamespace) -> None:
    """Probes the run and prints the path of the file."""
    cli.require(args, "workdir")
    allowed = ("diffjax", *args.allowed_packages)
    path = probe_run(
        Path(args.workdir),
        num_images=args.num_images,
        seed=args.seed,
        data_path=args.data_path,
        out=args.out,
        allowed_packages=allowed,
    )
    print(path)


USAGE = __doc__ or ""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
