"""`python -m experiments.benchmark`."""

import sys

from experiments import cli
from experiments.benchmark import FLAGS, USAGE, main

sys.exit(cli.run(main, FLAGS, usage=USAGE))
