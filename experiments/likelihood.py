r"""Bits per dimension of the test images under a trained run: lower is better.

  python -m experiments.likelihood --workdir=runs/digits --method=ode --trace=exact
  python -m experiments.likelihood --workdir=runs/digits --method=vlb --num_times=256

Prints one line and writes the result with its provenance to likelihood.json in the run's folder.
Each number is an upper bound on the code length of 8-bit images. Guidance is not used.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

import diffjax
from diffjax.errors import UserError
from diffjax.host.processes import in_first, is_first
from diffjax.host.progress import progress
from diffjax.host.storage import make_writable, translate_storage_errors
from diffjax.host.watchdog import watched
from diffjax.runs.measuring.likelihoods import METHODS, Method, WantedBits, measure_likelihood
from diffjax.runs.measuring.measure import add_likelihood
from diffjax.spec import choose
from experiments.evaluate import of_first_folder
from experiments.flags import cli, shared

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder for the results (--workdir)", flag_values=FLAGS)
cli.define_step(FLAGS)
flags.DEFINE_string("method", "ode", "ode, vlb or discrete_vlb", flag_values=FLAGS)
flags.DEFINE_string("trace", None, "ode: hutchinson or exact", flag_values=FLAGS)
flags.DEFINE_integer(
    "num_probes", None, "ode: probes of hutchinson", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_integer(
    "num_steps", None, "ode, discrete_vlb: number of steps", lower_bound=2, flag_values=FLAGS
)
flags.DEFINE_float(
    "tolerance", None, "ode: error tolerance of adaptive steps, instead of num_steps",
    lower_bound=1e-6, flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer(
    "num_times",
    None,
    "vlb, discrete_vlb: noise levels per image",
    lower_bound=2,
    flag_values=FLAGS,
)
flags.DEFINE_string("dequantisation", None, "none, uniform or variational", flag_values=FLAGS)
flags.DEFINE_integer(
    "dequantiser_steps",
    500,
    "training steps of a variational dequantiser",
    lower_bound=1,
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "num_images", None, "number of test images (all)", lower_bound=2, flag_values=FLAGS
)
flags.DEFINE_integer("seed", 0, "seed of probes, times and noise", flag_values=FLAGS)
flags.DEFINE_string("weights", None, "live, or an average such as ema-0.999", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 128, "images per batch", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("data_path", None, "new path of the data, if moved", flag_values=FLAGS)
flags.DEFINE_list(
    "allowed_packages", [], "your packages that the saved config may name", flag_values=FLAGS
)
shared.define_watchdog(FLAGS)


def main(args: Any) -> None:
    """Measures the likelihood, prints one line, and writes it to the run's folder."""
    cli.require(args, "workdir")
    given = options_given(choose(METHODS, args.method, "method"), args)
    allowed = ("diffjax", *args.allowed_packages)
    run = diffjax.load(args.workdir, step=args.step, weights=args.weights, allowed_packages=allowed)
    if args.out is not None:
        run = of_first_folder(run, args.out)
    in_first(lambda: make_writable(run.workdir))  # Fails before the work, if it does.
    with (
        watched(shared.watchdog(args), run.workdir, what="batch") as begun,
        progress(f"measuring bits per dimension by {args.method}"),
    ):
        wanted = WantedBits(
            args.method,
            given,
            weights=args.weights,
            num_images=args.num_images or 0,
            batch_size=args.batch_size,
            dequantiser_steps=args.dequantiser_steps,
            seed=args.seed,
        )
        result = measure_likelihood(run, run.dataset(args.data_path), wanted, begun)
    if is_first():
        with translate_storage_errors(run.workdir):
            add_likelihood(run.workdir, result)
    print(line(result))


def options_given(make: Callable[..., Method], args: Any) -> dict[str, Any]:
    """The options of a method that are set by flags.

    Raises:
        UserError: a flag is set that this method does not use.
    """
    known = inspect.signature(make).parameters
    every = {name for method in METHODS.values() for name in inspect.signature(method).parameters}
    given = {name: getattr(args, name) for name in every if getattr(args, name) is not None}
    unused = sorted(given.keys() - known.keys())
    if unused:
        uses = ", ".join(f"--{name}" for name in known)
        raise UserError(
            f"--{unused[0]} is not used by --method={args.method}, which has the flags {uses}"
        )
    return given


def line(result: dict[str, Any]) -> str:
    """Formats a result as one line."""
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
