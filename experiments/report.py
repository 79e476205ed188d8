r"""Write one page that compares runs: verdict, quality by cost, losses, samples, settings.

  python -m experiments.report --workdir=runs/sweeps/digits_objectives
  python -m experiments.report --workdir=runs/digits,runs/digits-ddpm --out=runs/comparison

--workdir is the folder of a sweep, a folder of runs, or several runs. The report only reads files,
so it is quick on any machine; for missing files it shows the command that makes them. Writes
report.html, which is self-contained, and its numbers as report.md, report.csv and report.json.
"""

import sys
from types import SimpleNamespace

from absl import flags

from diffjax.host.progress import progress
from diffjax.reports.sweep_page import write_sweep_report
from experiments.flags import cli

FLAGS = flags.FlagValues()
flags.DEFINE_list("workdir", None, "a sweep's folder, or runs' folders", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder; the sweep's own by default", flag_values=FLAGS)


def main(args: SimpleNamespace) -> None:
    """Writes the report and prints the path of its page."""
    cli.require(args, "workdir")
    with progress("writing the report"):
        page = write_sweep_report(args.workdir, args.out)
    print(f"open {page}")


USAGE = __doc__ or ""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
