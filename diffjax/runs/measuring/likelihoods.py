"""Bits per dimension of the test images under a trained run, by several methods."""

import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jax import Array

from diffjax.compiling import jit
from diffjax.data import Batch, DataSet, all_examples, eval_batches
from diffjax.errors import UserError
from diffjax.kinds import AtLeastOne, NotNegative, Range
from diffjax.likelihood import bound, dequantise
from diffjax.likelihood import ode as ode_module
from diffjax.likelihood.dequantise import Dequantised
from diffjax.objectives.base import Objective
from diffjax.process.paths import Path
from diffjax.process.precond import Meaning, Predict
from diffjax.runs.load import Run
from diffjax.runs.samples.model import Model, full_batch
from diffjax.spec import check_arguments, choose
from diffjax.training import sharding
from diffjax.training.sharding import batch_sharding, replicated

Estimate = Callable[[Predict, Path, Array, Array, Array], Any]
"""`(predict, path, x, keys, cond) ->` something with `log_p`, `standard_error` and `nfe`."""
Spread = Callable[[Array, Array], Dequantised]
"""`(keys, x) -> Dequantised`."""
Several = Annotated[int, Range("[2, inf)")]


class Method(NamedTuple):
    """One method to estimate likelihoods.

    Attributes:
        estimate: the estimate of `log p`, or of `log P` where `discrete`.
        coarser: the same estimate with larger steps, to measure the error of the steps; None if
            the method has no such error.
        discrete: whether the estimate is of grey levels, without dequantisation.
    """

    estimate: Estimate
    coarser: Estimate | None = None
    discrete: bool = False


def ode(
    dequantisation: str = "uniform",
    trace: str = "hutchinson",
    num_probes: AtLeastOne[int] = 2,
    num_steps: Several | None = None,
    tolerance: Annotated[float, Range("[1e-6, inf)")] | None = None,
) -> Method:
    """The probability-flow ODE."""
    if dequantisation == "none":
        raise UserError("the method ode needs dequantisation uniform or variational")
    traces = {
        "hutchinson": ode_module.Hutchinson(num_probes),
        "exact": ode_module.ExactTrace(),
    }
    how = choose(traces, trace, "trace")

    if num_steps is not None and tolerance is not None:
        raise UserError("num_steps fixes the steps and tolerance adapts them: give one of them")
    if tolerance is not None:
        fine, coarse = (ode_module.AdaptiveSteps(one) for one in (tolerance, 10 * tolerance))
    else:
        steps = num_steps or ode_module.FixedSteps().num_steps
        fine, coarse = (ode_module.FixedSteps(one) for one in (steps, steps // 2))
    fine, coarse = (ode_module.OdeLogLikelihood(each, how) for each in (fine, coarse))
    return Method(fine, coarser=coarse)


def vlb(dequantisation: str = "none", num_times: Several = 64) -> Method:
    """The variational bound in continuous time."""
    return _bound(bound.ContinuousTime(), num_times, dequantisation)


def discrete_vlb(
    dequantisation: str = "none", num_steps: Several = 1000, num_times: Several = 64
) -> Method:
    """The variational bound of so many steps, estimated from some of them."""
    return _bound(bound.DiscreteTime(num_steps), num_times, dequantisation)


def _bound(when: bound.Time, num_times: int, dequantisation: str) -> Method:
    discrete = dequantisation == "none"
    decoder = bound.DiscreteDecoder() if discrete else bound.gaussian_decoder
    return Method(bound.VariationalBound(when, num_times, decoder), discrete=discrete)


METHODS = {"ode": ode, "vlb": vlb, "discrete_vlb": discrete_vlb}


@dataclass(frozen=True)
class WantedBits:
    """The bits per dimension to measure.

    Attributes:
        method: a key of `METHODS`.
        options: the options of the method.
        weights: `live` or an average; the run's own by default.
        num_images: evenly spaced ones of the test set; 0 takes all.
        batch_size: images at a time.
        dequantiser_steps: updates that fit a variational dequantiser.
        seed: the seed of probes, times and noise.

    Raises:
        UserError: one of another kind, or a number out of range.
    """

    method: Any = "ode"
    options: Mapping[str, Any] | None = None
    weights: str | None = None
    num_images: NotNegative[int] = 0
    batch_size: AtLeastOne[int] = 128
    dequantiser_steps: AtLeastOne[int] = 500
    seed: int = 0

    def __post_init__(self) -> None:
        check_arguments(WantedBits, **vars(self))


def measure_likelihood(
    run: Run,
    dataset: DataSet,
    wanted: WantedBits = WantedBits(),
    begun: Callable[[int], Any] = lambda batch: None,
) -> dict[str, Any]:
    """Measures bits per dimension of test images.

    Args:
        run: the model.
        dataset: whose test images are coded; of 8 bits.
        wanted: the method, its options, and how many images.
        begun: called with the number of each batch of images; a fit of a dequantiser is one.

    Returns:
        Plain JSON: `bits_per_dim`, its errors, and how it came about.

    Raises:
        UserError: no such method or option, data without bits, a run without a likelihood.
    """
    method, given = wanted.method, wanted.options or {}
    check_levels(dataset)
    check_likelihood(run.parts.wired.objective, method)
    make = METHODS[method]
    for name in given:
        choose(method_options(make), name, f"option of {method}")
    options = method_options(make) | dict(given)
    check_arguments(make, **options)
    spreads = {"none": _as_they_are, "uniform": dequantise.uniform, "variational": None}
    dequantisation = options["dequantisation"]
    spread = choose(spreads, dequantisation, "dequantisation")
    made = make(**options)
    model = run.model(wanted.weights)
    found = min(wanted.num_images or len(dataset.test), len(dataset.test))
    at_once = full_batch(min(wanted.batch_size, max(found, 1)), model.mesh)
    estimate_key, fit_key = jax.random.split(jax.random.key(wanted.seed))
    began, numbers = time.perf_counter(), count(1)

    def beat() -> None:
        begun(next(numbers))

    if spread is None:
        beat()
        spread = fitted(model, dataset, fit_key, wanted.dequantiser_steps)
    measure = measurer(model, spread, estimate_key, at_once, beat)

    def batches() -> Iterator[Batch]:
        return eval_batches(dataset.test, batch_size=at_once, limit_images=wanted.num_images)

    return _bits(made, measure, batches, wanted.batch_size) | {
        "method": method,
        **options,
        "dequantiser_steps": wanted.dequantiser_steps if spreads[dequantisation] is None else None,
        "split": "test",
        "data": dataset.name,
        "test_sha256": dataset.test.fingerprint(),
        "seed": wanted.seed,
        "step": run.step,
        "weights": wanted.weights or run.config.weights,
        "seconds": time.perf_counter() - began,
    }


def _bits(
    made: Method, measure: Callable, batches: Callable[[], Iterator[Batch]], batch_size: int
) -> dict[str, Any]:
    """The estimates of these images, and how larger steps change those of the first images."""
    first = next(batches())
    dimensions = math.prod(first["image"].shape[1:])
    log_p, errors, nfe = measure(made.estimate, made.discrete, batches())
    if not np.isfinite(log_p).all():
        raise UserError(
            f"{(~np.isfinite(log_p)).sum()} of {len(log_p)} likelihoods are not finite: "
            "take more steps or a larger tolerance"
        )
    result = bits_summary(log_p, errors, dimensions) | {"nfe": nfe}
    if made.coarser is None:
        return result
    few = slice(0, batch_size)
    whole: Any = first
    part: Any = {name: rows[few] for name, rows in whole.items()}
    coarse, _, _ = measure(made.coarser, made.discrete, [part])
    shift = dequantise.bits_per_dim(log_p[few] - coarse, dimensions)
    return result | {"coarser_steps_change": float(np.mean(shift))}


def check_levels(dataset: DataSet) -> None:
    """Refuses data that are not pixels: bits per dimension are defined for 8-bit images.

    Raises:
        UserError: they are latents.
    """
    if not dataset.codec.pixels:
        raise UserError(
            f"{dataset.name} holds no 8-bit images but latents (codec {dataset.codec.name}), which "
            "have no bits per dimension"
        )


def check_likelihood(objective: Objective, method: str) -> None:
    """Refuses models without a likelihood, before anything is measured.

    Args:
        objective: that the network is trained by.
        method: a key of `METHODS`.

    Raises:
        UserError: see above.
    """
    choose(METHODS, method, "method")
    if objective.traits.starts_at_source:
        raise UserError(
            "a run that goes from one image to another has no density at its start: no likelihood"
        )
    if not objective.traits.meaning.serves(Meaning.POSTERIOR_MEAN):
        raise UserError(
            f"{type(objective).__name__} trains a model of {objective.traits.meaning}, and a "
            "likelihood needs the posterior mean at each time: take a run of another objective, "
            "such as objective=flow"
        )
    if method != "ode" and not objective.traits.independent_noise:
        raise UserError(
            "of training on images paired with their noise, or with noise in between, no bound is "
            "known for the sampler: take the method ode"
        )


def method_options(make: Callable[..., Method]) -> dict[str, Any]:
    """The options of a method.

    Example:
        >>> method_options(vlb)
        {'dequantisation': 'none', 'num_times': 64}
    """
    return {name: p.default for name, p in inspect.signature(make).parameters.items()}


def measurer(
    model: Model,
    spread: Spread,
    key: Array,
    batch_size: int,
    beat: Callable[[], None],
) -> Callable:
    """`(estimate, discrete, batches) -> (log P[N], standard error[N], nfe)`.

    Batches have `batch_size` images, which the mesh divides, or fewer in the last; one at a time is
    in memory. Image i depends on the seed and on i, not on the batch or the mesh. `beat` is called
    as each batch begins.
    """
    wired, mesh = model.wired, model.mesh

    def measure(
        estimate: Estimate, discrete: bool, batches: Iterable[Batch]
    ) -> tuple[np.ndarray, np.ndarray, int]:
        def of_batch(params: Any, x: Array, cond: Any, keys: Array) -> tuple[Array, ...]:
            predict = wired.predict(params)
            both = jax.vmap(jax.random.split)(keys)
            noisy = spread(both[:, 0], x)
            result = estimate(predict, wired.path, noisy.x, both[:, 1], cond)
            log_p = result.log_p if discrete else dequantise.discrete_log_p(result.log_p, noisy)
            return log_p, result.standard_error, result.nfe

        compiled = jit(of_batch, mesh, out_shardings=replicated(mesh))
        place = batch_sharding(mesh)
        parts = []
        for number, batch in enumerate(batches):
            # The last batch is filled up, so that every batch has the shape that was compiled.
            n, here = len(batch["image"]), np.arange(batch_size)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, number * batch_size + here)
            padded = np.minimum(here, n - 1)
            cond = wired.condition.take(wired.condition.of_batch(batch), padded)
            arrays = sharding.spread((batch["image"][padded], cond, keys), place)
            beat()
            log_p, errors, nfe = compiled(model.params, *arrays)
            parts.append((np.asarray(log_p)[:n], np.asarray(errors)[:n], int(nfe)))
        log_p, errors, nfe = zip(*parts, strict=True)
        return np.concatenate(log_p), np.concatenate(errors), max(nfe)

    return measure


def fitted(model: Model, dataset: DataSet, key: Array, num_steps: int) -> Spread:
    """A dequantiser learned on training images, by the bound in continuous time."""
    wired, predict = model.wired, model.predict()
    batch = all_examples(dataset.train, limit_images=10_000)
    conditions = jax.tree.map(jax.numpy.asarray, wired.condition.of_batch(batch))
    estimate = bound.VariationalBound(num_times=4)

    def log_density(x: Array, keys: Array, rows: Array) -> Array:
        cond = jax.tree.map(lambda leaf: leaf[rows], conditions)
        return estimate(predict, wired.path, x, keys, cond).log_p

    images = jax.numpy.asarray(batch["image"])
    learned, _ = dequantise.fit_dequantiser(log_density, images, key, num_steps=num_steps)
    return lambda keys, x: dequantise.variational(learned, keys, x)


def bits_summary(log_p: np.ndarray, errors: np.ndarray, d: int) -> dict[str, Any]:
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


def _as_they_are(keys: Array, x: Array) -> Dequantised:
    return Dequantised(x, jax.numpy.zeros(len(x)))
