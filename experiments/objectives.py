"""Compare all objectives: effective weights by log-SNR, and legal combinations.

  python -m experiments.objectives --out=objectives

Writes index.html, and its plot and tables as separate files, in about a minute. It needs no run,
data or network connection.
"""

import sys
from types import SimpleNamespace

from absl import flags

from diffjax.reports.objectives_page import write_objectives_page
from experiments import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("out", None, "folder to write into", flag_values=FLAGS)


def main(args: SimpleNamespace) -> None:
    """Writes the page and prints its path."""
    cli.require(args, "out")
    print("computing the effective weights of all objectives: a minute or more", flush=True)
    print(f"open {write_objectives_page(args.out)}")


USAGE = __doc__ or ""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
