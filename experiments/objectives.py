"""Compare all objectives: what they pay for at each log-SNR, and what goes with what.

  python -m experiments.objectives --out=objectives

Writes index.html, and its plot and tables as files of their own, in about a minute. No run, data
or network is needed.
"""

import sys
from types import SimpleNamespace

from absl import flags

from diffjax.reports.objectives_page import write_objectives_page
from experiments import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("out", None, "folder to write into", flag_values=FLAGS)


def main(args: SimpleNamespace) -> None:
    """Writes the page and names it."""
    cli.require(args, "out")
    print(f"open {write_objectives_page(args.out)}")


USAGE = __doc__ or ""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
