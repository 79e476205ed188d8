r"""Bits per dimension of the test images under a trained run: lower is better.

  python -m experiments.likelihood --workdir=runs/digits --method=ode --trace=exact
  python -m experiments.likelihood --workdir=runs/digits --method=vlb --num_times=256

Prints one line and writes it, with how it came about, into likelihood.json in the run's folder.
Each number is an upper bound on the code length of 8-bit images. Guidance plays no part.
"""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

import diffjax
from diffjax.errors import UserError
from diffjax.host.processes import in_first, is_first
from diffjax.host.storage import make_writable, translate_storage_errors
from diffjax.host.watchdog import watched
from diffjax.runs.likelihoods import METHODS, Method, measure_likelihood
from diffjax.runs.measure import add_likelihood
from diffjax.spec import choose
from experiments import cli, hanging

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
flags.DEFINE_string("method", "ode", "ode, vlb or discrete_vlb", flag_values=FLAGS)
flags.DEFINE_string("trace", None, "ode: hutchinson or exact", flag_values=FLAGS)
flags.DEFINE_integer("num_probes", None, "ode: of hutchinson", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "num_steps", None, "ode, discrete_vlb: as many steps", lower_bound=2, flag_values=FLAGS
)
flags.DEFINE_float(
    "tolerance", None, "ode: adaptive steps in the place of num_steps",
    lower_bound=1e-6, flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer(
    "num_times", None, "vlb, discrete_vlb: noise levels an image", lower_bound=2, flag_values=FLAGS
)
flags.DEFINE_string("dequantisation", None, "none, uniform or variational", flag_values=FLAGS)
flags.DEFINE_integer(
    "dequantiser_steps", 500, "updates that fit a variational one", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_integer("num_images", None, "of the test set (all)", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "of probes, times and noise", flag_values=FLAGS)
flags.DEFINE_string("weights", None, "live, or an average such as ema-0.999", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 128, "images at a time", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("data_path", None, "where the data lie now, if moved", flag_values=FLAGS)
flags.DEFINE_list(
    "allowed_packages", [], "of your own, that the saved config may name", flag_values=FLAGS
)
hanging.define(FLAGS)


def main(args: Any) -> None:
    """Measures, prints one line, and writes it down."""
    cli.require(args, "workdir")
    given = options_given(choose(METHODS, args.method, "method"), args)
    allowed = ("diffjax", *args.allowed_packages)
    run = diffjax.load(args.workdir, weights=args.weights, allowed_packages=allowed)
    in_first(lambda: make_writable(run.workdir))  # Which shows before the work.
    with watched(hanging.watchdog(args), Path(args.workdir), what="batch") as begun:
        result = measure_likelihood(
            run,
            run.dataset(args.data_path),
            args.method,
            given,
            weights=args.weights,
            num_images=args.num_images or 0,
            batch_size=args.batch_size,
            dequantiser_steps=args.dequantiser_steps,
            seed=args.seed,
            begun=begun,
        )
    if is_first():
        with translate_storage_errors(run.workdir):
            add_likelihood(run.workdir, result)
    print(line(result))


def options_given(make: Callable[..., Method], args: Any) -> dict[str, Any]:
    """What flags give a method.

    Raises:
        UserError: a flag is set that this method has no use for.
    """
    known = inspect.signature(make).parameters
    every = {name for method in METHODS.values() for name in inspect.signature(method).parameters}
    given = {name: getattr(args, name) for name in every if getattr(args, name) is not None}
    unused = sorted(given.keys() - known.keys())
    if unused:
        takes = ", ".join(f"--{name}" for name in known)
        raise UserError(f"--{unused[0]} has no part in --method={args.method}, which takes {takes}")
    return given


def line(result: dict[str, Any]) -> str:
    """What is printed."""
    own, change = result["estimator_error"], result.get("coarser_steps_change")
    parts = [
        f"{result['bits_per_dim']:.4f} ± {result['standard_error']:.4f} bits/dim",
        f"{result['num_images']:,} test images",
        "estimator's error unknown" if own is None else f"estimator's error {own:.4f}",
    ]
    if change is not None:
        parts.append(f"coarser steps change it by {change:.4f}")
    parts.append(f"nfe={result['nfe']}")
    return f"{result['method']}, {result['dequantisation']}: " + ", ".join(parts)


USAGE = f"""{__doc__}
Methods: {", ".join(METHODS)}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
