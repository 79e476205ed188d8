r"""Bits per dimension of the test images under a trained run: lower is better.

  python -m experiments.likelihood --workdir=runs/digits --method=ode --trace=exact
  python -m experiments.likelihood --workdir=runs/digits --method=vlb --num_times=256

Prints one line and writes it, with how it came about, into likelihood.json in the run's folder.
Each number is an upper bound on the code length of 8-bit images. Guidance plays no part.
"""

import inspect
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax import Array

import diffjax
from diffjax.data import DataSet
from diffjax.data.pipeline import all_images
from diffjax.errors import UserError
from diffjax.evaluation.run_files import read_json
from diffjax.process.paths import Path
from diffjax.process.precond import Predict, denoiser
from diffjax.sampling import bound, dequantise, likelihood
from diffjax.sampling.dequantise import Dequantised
from diffjax.spec import build, choose
from diffjax.training.load import Run
from diffjax.training.measure import write_json
from diffjax.training.sharding import batch_sharding, replicated
from experiments import cli

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
flags.DEFINE_list(
    "allowed_packages", [], "of your own, that the saved config may name", flag_values=FLAGS
)

Estimate = Callable[[Predict, Path, Array, Array, Array], Any]
"""`(predict, path, x, keys, labels) ->` something with `log_p`, `standard_error` and `nfe`."""
Spread = Callable[[Array, Array], Dequantised]
"""`(keys, x) -> Dequantised`."""


class Method(NamedTuple):
    """A way to a likelihood.

    Attributes:
        estimate: of `log p`, or of `log P` where `discrete`.
        coarser: the same with larger steps, to see what they do; None if there is no such error.
        discrete: the estimate is of grey levels as they are.
    """

    estimate: Estimate
    coarser: Estimate | None = None
    discrete: bool = False


def ode(
    dequantisation: str = "uniform",
    trace: str = "hutchinson",
    num_probes: int = 2,
    num_steps: int | None = None,
    tolerance: float | None = None,
) -> Method:
    """The probability-flow ODE."""
    if dequantisation == "none":
        raise UserError("--method=ode needs --dequantisation=uniform or variational")
    traces = {
        "hutchinson": likelihood.Hutchinson(num_probes),
        "exact": likelihood.ExactTrace(),
    }
    how = choose(traces, trace, "trace")

    def estimate(integrate: likelihood.Integrate) -> Estimate:
        def run(predict: Predict, path: Path, x: Array, keys: Array, labels: Array) -> Any:
            return likelihood.ode_log_likelihood(
                predict, path, x, keys, labels, integrate=integrate, trace=how
            )

        return run

    if num_steps is not None and tolerance is not None:
        raise UserError("--num_steps fixes the steps and --tolerance adapts them: give one of them")
    if tolerance is not None:
        return Method(
            estimate(likelihood.Adaptive(tolerance)),
            coarser=estimate(likelihood.Adaptive(10 * tolerance)),
        )
    steps = num_steps or likelihood.FixedSteps().num_steps
    return Method(
        estimate(likelihood.FixedSteps(steps)),
        coarser=estimate(likelihood.FixedSteps(steps // 2)),
    )


def vlb(dequantisation: str = "none", num_times: int = 64) -> Method:
    """The variational bound in continuous time."""
    return _bound(bound.ContinuousTime(), num_times, dequantisation)


def discrete_vlb(
    dequantisation: str = "none", num_steps: int = 1000, num_times: int = 64
) -> Method:
    """The variational bound of so many steps, estimated from some of them."""
    return _bound(bound.DiscreteTime(num_steps), num_times, dequantisation)


def _bound(when: bound.Time, num_times: int, dequantisation: str) -> Method:
    discrete = dequantisation == "none"
    decoder = bound.DiscreteDecoder() if discrete else bound.gaussian_decoder

    def estimate(predict: Predict, path: Path, x: Array, keys: Array, labels: Array) -> Any:
        return bound.variational_bound(
            predict, path, x, keys, labels, time=when, num_times=num_times, decoder=decoder
        )

    return Method(estimate, discrete=discrete)


METHODS = {"ode": ode, "vlb": vlb, "discrete_vlb": discrete_vlb}


def main(args: Any) -> None:
    """Measures, prints one line, and writes it down."""
    cli.require(args, "workdir")
    make = choose(METHODS, args.method, "method")
    options = options_of(make, args)
    spreads = {"none": _as_they_are, "uniform": dequantise.uniform, "variational": None}
    dequantisation = options["dequantisation"]
    spread = choose(spreads, dequantisation, "dequantisation")
    method = make(**options)
    run = diffjax.load(args.workdir, allowed_packages=("diffjax", *args.allowed_packages))
    if run.setup.wired.objective.starts_at_source:
        raise UserError(
            f"{args.workdir} goes from one image to another, and there is no density at its start"
        )
    if args.method != "ode" and not run.setup.wired.objective.independent_noise:
        raise UserError(
            f"{args.workdir} was trained on images paired with their noise, or with noise in "
            "between: no bound is known for its sampler; use --method=ode"
        )
    params = run.weights(args.weights)
    dataset = build(run.config.data)
    estimate_key, fit_key = jax.random.split(jax.random.key(args.seed))
    began = time.perf_counter()
    if spread is None:
        spread = fitted(run, params, dataset, fit_key, args.dequantiser_steps)
    images, labels = all_images(dataset.test, limit_images=args.num_images or 0)
    measure = measurer(run, params, spread, estimate_key, min(args.batch_size, len(images)))
    log_p, errors, nfe = measure(method.estimate, method.discrete, images, labels)
    if not np.isfinite(log_p).all():
        raise UserError(
            f"{(~np.isfinite(log_p)).sum()} of {len(log_p)} likelihoods are not finite: "
            "take more steps or a larger tolerance"
        )
    result = summary(log_p, errors, math.prod(images.shape[1:]))
    if method.coarser is not None:
        few = slice(0, args.batch_size)
        coarse, _, _ = measure(method.coarser, method.discrete, images[few], labels[few])
        shift = dequantise.bits_per_dim(log_p[few] - coarse, math.prod(images.shape[1:]))
        result["coarser_steps_change"] = float(np.mean(shift))
    result |= {
        "method": args.method,
        **options,
        "dequantiser_steps": args.dequantiser_steps if spreads[dequantisation] is None else None,
        "nfe": nfe,
        "split": "test",
        "data": dataset.name,
        "test_sha256": dataset.test.fingerprint(),
        "seed": args.seed,
        "step": run.step,
        "weights": args.weights or run.config.weights,
        "seconds": time.perf_counter() - began,
    }
    path = run.workdir / "likelihood.json"
    written = read_json(path) or {}
    if jax.process_index() == 0:
        write_json(path, written | {f"{args.method}-{dequantisation}": result})
    print(line(result))


def options_of(make: Callable[..., Method], args: Any) -> dict[str, Any]:
    """What a method is given: its own defaults, and the flags that are set.

    Raises:
        UserError: a flag is set that this method has no use for.
    """
    known = {name: p.default for name, p in inspect.signature(make).parameters.items()}
    every = {name for method in METHODS.values() for name in inspect.signature(method).parameters}
    given = {name: getattr(args, name) for name in every if getattr(args, name) is not None}
    unused = sorted(given.keys() - known.keys())
    if unused:
        takes = ", ".join(f"--{name}" for name in known)
        raise UserError(f"--{unused[0]} has no part in --method={args.method}, which takes {takes}")
    return known | given


def measurer(run: Run, params: Any, spread: Spread, key: Array, batch_size: int) -> Callable:
    """`(estimate, discrete, images, labels) -> (log P[N], standard error[N], nfe)`.

    Image i depends on the seed and on i, not on the batch or the mesh.
    """
    wired, mesh = run.setup.wired, run.setup.mesh
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-batch_size // rows) * rows

    def measure(
        estimate: Estimate, discrete: bool, images: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, int]:
        def of_batch(params: Any, x: Array, labels: Array, keys: Array) -> tuple[Array, ...]:
            predict = denoiser(wired.apply, params, wired.path, wired.precond)
            both = jax.vmap(jax.random.split)(keys)
            noisy = spread(both[:, 0], x)
            result = estimate(predict, wired.path, noisy.x, both[:, 1], labels)
            log_p = result.log_p if discrete else dequantise.discrete_log_p(result.log_p, noisy)
            return log_p, result.standard_error, result.nfe

        compiled = jax.jit(of_batch, out_shardings=replicated(mesh))
        place = batch_sharding(mesh)
        parts = []
        for start in range(0, len(images), batch_size):
            # The last batch is filled up, so that every batch has the shape that was compiled.
            here = np.arange(start, start + batch_size)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, here)
            padded = np.minimum(here, len(images) - 1)
            arrays = (images[padded], labels[padded], keys)
            parts.append(compiled(params, *(jax.device_put(array, place) for array in arrays)))
        log_p, errors = (np.concatenate([part[i] for part in parts])[: len(images)] for i in (0, 1))
        return log_p, errors, max(int(part[2]) for part in parts)

    return measure


def fitted(run: Run, params: Any, dataset: DataSet, key: Array, num_steps: int) -> Spread:
    """A dequantiser learned on training images, by the bound in continuous time."""
    wired = run.setup.wired
    images, labels = all_images(dataset.train, limit_images=10_000)

    def log_density(x: Array, keys: Array, labels: Array | None) -> Array:
        predict = denoiser(wired.apply, params, wired.path, wired.precond)
        return bound.variational_bound(predict, wired.path, x, keys, labels, num_times=4).log_p

    learned, _ = dequantise.fit_dequantiser(
        log_density,
        jax.numpy.asarray(images),
        jax.numpy.asarray(labels),
        key,
        num_steps=num_steps,
    )
    return lambda keys, x: dequantise.variational(learned, keys, x)


def summary(log_p: np.ndarray, errors: np.ndarray, d: int) -> dict[str, Any]:
    """The mean over images in bits per dimension, and how far it may be off.

    `standard_error` is that of the mean over images, the estimates' own noise included;
    `estimator_error` is the part of that noise that each estimate states, None if it can't.
    """
    n = len(log_p)
    scale = 1.0 / (d * math.log(2.0))
    own = scale * math.sqrt(np.mean(np.square(errors)) / n)
    return {
        "bits_per_dim": float(-scale * np.mean(log_p)),
        "standard_error": scale * float(np.std(log_p, ddof=1)) / math.sqrt(n),
        "estimator_error": own if math.isfinite(own) else None,
        "num_images": n,
    }


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


def _as_they_are(keys: Array, x: Array) -> Dequantised:
    return Dequantised(x, jax.numpy.zeros(len(x)))


USAGE = f"""{__doc__}
Methods: {", ".join(METHODS)}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
