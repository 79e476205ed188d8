"""`python -m experiments.benchmark`."""

import sys

from experiments.benchmark import FLAGS, USAGE, main
from experiments.flags import cli

sys.exit(cli.run(main, FLAGS, usage=USAGE))
