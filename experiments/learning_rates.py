"""Final loss over the learning rate for several widths of a transformer, with and without muP.

  python -m experiments.learning_rates --config=configs/digits.py --out=learning_rates

Trains each network once for each rate and seed, without pictures, averages or checkpoints, and
writes learning_rates.png, .md and .json. With muP the best rate of the base width is that of all.
Heads grow with the width. The data have to fit into memory.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from absl import flags

from diffjax.data import DataSet
from diffjax.errors import UserError
from diffjax.spec import build
from diffjax.studies.learning_rates import Losses, final_losses, of_width, plot, table
from experiments.flags import cli

FLAGS = flags.FlagValues()
cli.define_config(FLAGS)
flags.DEFINE_string("out", None, "folder of the results", flag_values=FLAGS)
flags.DEFINE_list("widths", ["32", "64", "128", "256"], "widths of the network", flag_values=FLAGS)
flags.DEFINE_integer("base_width", 32, "that of muP", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_list(
    "rates",
    [f"{2.0**-power:.3g}" for power in range(11, 3, -1)],
    "learning rates",
    flag_values=FLAGS,
)
flags.DEFINE_integer("seeds", 3, "trainings of each", lower_bound=1, flag_values=FLAGS)


def main(args: SimpleNamespace) -> None:
    """Trains all of them, and writes and prints the results."""
    for name in ("config", "out"):
        cli.require(args, name)
    widths = [int(width) for width in _numbers(args.widths, "widths", whole=True)]
    rates = tuple(sorted(_numbers(args.rates, "rates")))
    dataset: DataSet = build(args.config.data, DataSet, "config.data")
    folder = Path(args.out)
    found = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for width in widths:
            for base_width in (0, args.base_width):
                begun = time.monotonic()
                config = of_width(args.config, width, base_width)
                losses = final_losses(config, dataset, rates, args.seeds)
                found.append(Losses(width, base_width > 0, rates, losses))
                print(
                    f"width {width}, {'muP' if base_width else 'standard'}: best rate "
                    f"{found[-1].best_rate:.3g}, {time.monotonic() - begun:.0f} s",
                    flush=True,
                )
                rows = [{**vars(one), "losses": one.losses.tolist()} for one in found]
                (folder / "learning_rates.json").write_text(json.dumps(rows, indent=1))
        (folder / "learning_rates.md").write_text(table(found))
        (folder / "learning_rates.png").write_bytes(plot(found))
    except OSError as error:
        raise UserError(f"can't write into {folder}: {error.strerror}") from error
    print(f"{table(found)}learning_rates.png, .md and .json in {folder}")


def _numbers(texts: list[str], name: str, whole: bool = False) -> list[float]:
    try:
        numbers = [float(text) for text in texts]
    except ValueError as error:
        raise UserError(f"--{name}: {error}") from None
    if not numbers or not all(0 < number < float("inf") for number in numbers):
        raise UserError(f"--{name}={','.join(texts)}: numbers above 0 are needed")
    if whole and any(number % 1 for number in numbers):
        raise UserError(f"--{name}={','.join(texts)}: whole numbers are needed")
    return numbers


USAGE = f"""{__doc__}
Configs (--config=configs/NAME.py): {", ".join(cli.config_names())}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
