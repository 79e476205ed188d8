"""Evaluators: metrics of a run at some of its steps, while it trains.

A config has them by name under `config.evaluators`, empty by default. The metric `M` of the
evaluator `E` is called `E/M` in `config.best_by` and on pages, and `eval/E/M` in `metrics.jsonl`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Protocol

import jax
from ml_collections import ConfigDict

from diffjax import choices
from diffjax.data import DataSet, all_examples
from diffjax.errors import UserError, nearest
from diffjax.evaluation import metrics
from diffjax.evaluation.distances import FEWEST_IMAGES
from diffjax.evaluation.image_statistics import Batches
from diffjax.evaluation.label_mix import proportional_labels
from diffjax.evaluation.reference import Reference
from diffjax.evaluation.tables import HIGHER_IS_BETTER
from diffjax.kinds import AtLeastOne, Range
from diffjax.runs.load import Run
from diffjax.runs.measure import (
    Wanted,
    label_shares,
    noise_seed,
    own_extractors,
    own_mix,
    reference_of,
    telling,
    wanted_recipes,
    wanted_samples,
)
from diffjax.runs.model import Request
from diffjax.settings import NumSamples, Seed
from diffjax.spec import build, choose
from diffjax.studies import validation
from diffjax.training.averages import Averages
from diffjax.training.state import LIVE

Begun = Callable[[int], Any]
_IN_SHORT = ("frechet_distance", "kernel_distance", "accuracy")
_OF_KNOWN_DATA = ("sliced_wasserstein", "mode_weights")
_FURTHER = (
    "frechet_distance_at_infinity",
    "precision",
    "recall",
    "density",
    "coverage",
    "inception_score",
    "cmmd",
    *_OF_KNOWN_DATA,
)


class Evaluator(Protocol):
    """Measures a run at one of its steps.

    It may have a method `check(run, dataset)` as well, which is called before step 1, with a run
    whose arrays are `ShapeDtypeStruct`, and raises a `UserError` if measuring it would fail.
    """

    @property
    def every_steps(self) -> int:
        """The steps from one measurement to the next; the last step is measured too."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics that a call returns."""
        ...

    @property
    def higher_is_better(self) -> tuple[str, ...]:
        """Those of `metrics` whose higher values are better."""
        ...

    def __call__(self, run: Run, dataset: DataSet, begun: Begun) -> Mapping[str, float]:
        """Measures a run.

        Args:
            run: at one step, with its arrays in memory.
            dataset: what it trains on.
            begun: to be called with a number before each batch, so that a long measurement is no
                hang, and ends where training should stop: by what `begun` raises.

        Returns:
            The value of each of `metrics`; NaN for one that can't be measured.
        """
        ...


def evaluators_of(config: ConfigDict) -> dict[str, Evaluator]:
    """The evaluators of a config by name; a config made by hand may have none.

    Raises:
        UserError: one can't be built, or is not an evaluator.
    """
    built = build(config.get("evaluators", {}), dict, "config.evaluators")
    for name, each in built.items():
        needed = ("every_steps", "metrics", "higher_is_better", "__call__")
        missing = [part for part in needed if not hasattr(each, part)]
        if missing:
            raise UserError(
                f"config.evaluators.{name}={each!r} is not an evaluator: it has no {missing[0]}"
            )
    return built


@dataclass(frozen=True)
class Samples:
    """Metrics of samples, as `experiments.evaluate` computes them for the run's own recipe.

    Recipe, labels, seed and extractor are those of the config (`config.sampling`,
    `config.evaluation`).

    Args:
        metrics: any of the metrics of docs/evaluation.md. Those but Fréchet distance, kernel
            distance and accuracy take longer, by the nearest neighbours among real images.
        every_steps: the steps from one measurement to the next; 1,000 to 10,000 are typical.
        num_samples: how many; 1,000 to 10,000 are typical. Values of other numbers can't be
            compared: the Fréchet distance falls with it.
        weights: `live` or an average; "" is `config.weights`.

    Example:
        >>> Samples(("frechet_distance", "recall"), every_steps=5_000).higher_is_better
        ('recall',)
    """

    metrics: tuple[str, ...] = ("frechet_distance",)
    every_steps: AtLeastOne[int] = 1_000
    num_samples: NumSamples = 1_000
    weights: str = ""
    _known: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def higher_is_better(self) -> tuple[str, ...]:
        """Those of `metrics` whose higher values are better."""
        return tuple(name for name in self.metrics if name in HIGHER_IS_BETTER)

    def check(self, run: Run, dataset: DataSet) -> None:
        """Refuses metrics that do not exist or can't be had, and weights that are not kept.

        Raises:
            UserError: the first of them.
        """
        if not self.metrics:
            raise UserError("metrics is empty: name one, like frechet_distance")
        for name in self.metrics:
            choose(dict.fromkeys((*_IN_SHORT, *_FURTHER)), name, "metric of samples")
        _check_weights(run, self.weights)
        if dataset.mixture is None and (exact := set(self.metrics) & set(_OF_KNOWN_DATA)):
            raise UserError(
                f"there is no {min(exact)} of {dataset.name}: that takes data whose distribution "
                "is known, as configs/colours.py"
            )
        if not {"accuracy", "cmmd"} & set(self.metrics):
            return
        extractor = own_extractors(run.config)[0]
        classifies = dataset.num_classes and extractor.test_accuracy is not None
        if "accuracy" in self.metrics and not classifies:
            raise UserError(
                f"there is no accuracy of {dataset.name} by {extractor.name}: that takes "
                "classes and a classifier of these"
            )
        if "cmmd" in self.metrics and not extractor.for_cmmd:
            raise UserError(f"there is no cmmd on features of {extractor.name}: that takes CLIP's")

    def __call__(self, run: Run, dataset: DataSet, begun: Begun) -> dict[str, float]:
        """Draws samples and compares them with the real images."""
        real = self._reference(run, dataset, begun)
        wired, settings = run.setup.wired, run.config.evaluation
        shares = label_shares(own_mix(run.config), wired, dataset, real.class_counts)
        labels = proportional_labels(self.num_samples, shares)
        samples = wanted_samples(wired, lambda: dataset, labels)
        named, _ = wanted_recipes(run, Wanted(weights=[self.weights or run.config.weights]))
        request = Request(
            samples.condition, noise_seed(run.config.seed, named.seed), samples.source
        )
        images = run.model(named.weights).batches(named.recipe, request, settings.batch_size, begun)
        found = metrics.compare(
            Batches(len(request), images),
            samples.labels if dataset.num_classes else None,
            real,
            all_metrics=any(name in _FURTHER for name in self.metrics),
        )
        return {name: _value(found[name]) for name in self.metrics}

    def _reference(self, run: Run, dataset: DataSet, begun: Begun) -> Reference:
        """The real images and their features, made at the first call."""
        if not self._known or self._known[0] is not dataset:
            extractor = own_extractors(run.config)[0]
            self._known[:] = (
                dataset, extractor, reference_of(dataset, extractor, lambda: begun(0))
            )  # fmt: skip
        _, extractor, real = self._known
        return replace(real, extractor=telling(lambda: begun(0), extractor))


@dataclass(frozen=True)
class Validation:
    """The validation loss: the error on test images, as the mean over log-SNR.

        loss = mean over λ of (D_space/s)²·mean_pixels (x0_predicted - x0)²

    `diffjax.studies.validation` explains it, and why runs of any objective may be compared by it.
    It needs no samples. The same images, noise and log-SNRs are used at each step.

    Args:
        every_steps: the steps from one measurement to the next; 1,000 is typical.
        num_images: how many test images, evenly spaced; 500 is typical.
        space: the target in whose space the error is (`choices.TARGETS`); in that of the noise,
            the loss is the integrand of the variational bound.
        weights: `live` or an average; "" is `config.weights`.
        seed: seed of noise and log-SNRs.

    Example:
        >>> Validation(every_steps=500, space="v").metrics
        ('loss',)
    """

    every_steps: AtLeastOne[int] = 1_000
    num_images: Annotated[int, Range("[2, inf)")] = 500
    space: str = "noise"
    weights: str = ""
    seed: Seed = 0
    _known: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    metrics = ("loss",)
    higher_is_better = ()

    def check(self, run: Run, dataset: DataSet) -> None:
        """Refuses models that predict no clean image, too few test images and unknown names.

        Raises:
            UserError: the first of them.
        """
        choose(choices.TARGETS, self.space, "target")
        _check_weights(run, self.weights)
        if reason := validation.unfit(run.setup.wired.objective.traits):
            raise UserError(f"this run {reason}")
        if len(dataset.test) < FEWEST_IMAGES:
            raise UserError(
                f"the validation loss is that of test images, and {dataset.name} has "
                f"{len(dataset.test)}: it needs {FEWEST_IMAGES}"
            )

    def __call__(self, run: Run, dataset: DataSet, begun: Begun) -> dict[str, float]:
        """Measures the error on test images."""
        wired = run.setup.wired
        if not self._known or self._known[0] is not wired:
            space = build(choose(choices.TARGETS, self.space, "target"))
            key = jax.random.key(self.seed)
            loss = validation.LossByLogSNR(wired.predict, wired.path, key, {self.space: space})
            self._known[:] = wired, loss
        batch = all_examples(dataset.test, self.num_images)
        cond = wired.condition.of_batch(batch)
        measured = self._known[1](run.weights(self.weights), batch["image"], cond, begun=begun)
        return {"loss": measured.total(self.space).mean}


def _check_weights(run: Run, name: str) -> None:
    kept = [LIVE, *Averages.of(run.config).names]
    if name and name not in kept:
        raise UserError(f"weights: no {name!r}; {nearest(name, kept)}")


def _value(found: Any) -> float:
    """The number of a metric, which has its provenance beside it; NaN where there is none."""
    value = found["value"] if isinstance(found, Mapping) else found
    return float("nan") if value is None else float(value)
