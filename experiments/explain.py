r"""Write one page that explains a trained model to a reader who knows no mathematics.

  python -m experiments.explain --workdir=runs/digits
  python -m experiments.explain --workdir=runs/digits --out=digits.html

The page shows noise levels, one training step with its numbers, the way from noise to pictures in
many steps and in one, guidance and its price, and the network drawn to scale: all with the pictures
and numbers of this run. Writes explain.html into the run's folder; it needs no other file and no
network. Without an accelerator it takes about half a minute for the digits.
"""

import sys
from types import SimpleNamespace

from absl import flags

from diffjax.explain.page import write_explanation
from experiments.flags import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
flags.DEFINE_string("out", None, "file; explain.html in the run's folder", flag_values=FLAGS)
flags.DEFINE_string("weights", None, "live, or an average such as ema-0.999", flag_values=FLAGS)
flags.DEFINE_integer(
    "num_steps", 1_000, "of the long way back", lower_bound=2, upper_bound=10_000, flag_values=FLAGS
)
flags.DEFINE_string("data_path", None, "folder of the data, if they have moved", flag_values=FLAGS)
flags.DEFINE_list(
    "allowed_packages", [], "your packages that the saved config may name", flag_values=FLAGS
)


def main(args: SimpleNamespace) -> None:
    """Writes the page and prints its path."""
    cli.require(args, "workdir")
    path = write_explanation(
        args.workdir,
        args.out,
        weights=args.weights,
        data_path=args.data_path,
        num_steps=args.num_steps,
        allowed_packages=("diffjax", *args.allowed_packages),
    )
    print(f"open {path}")


USAGE = __doc__ or ""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
