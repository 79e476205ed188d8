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
from diffjax.evaluation.image_statistics import Batches
from diffjax.evaluation.reference import Reference
from diffjax.evaluation.scores.distances import FEWEST_IMAGES
from diffjax.evaluation.scores.label_mix import proportional_labels
from diffjax.evaluation.tables import HIGHER_IS_BETTER
from diffjax.kinds import AtLeastOne, Range
from diffjax.runs.load import Run
from diffjax.runs.measuring.evaluated_samples import (
    label_shares,
    own_mix,
    own_prompts,
    wanted_samples,
)
from diffjax.runs.measuring.measure import noise_seed, own_extractor, reference_of, with_beat
from diffjax.runs.samples.model import Request
from diffjax.settings import NumSamples, Seed
from diffjax.spec import build, choose
from diffjax.studies import validation
from diffjax.training.averages import Averages
from diffjax.training.sharding import batch_sharding
from diffjax.training.state import LIVE

Begun = Callable[[int], Any]
_OF_TEXTS = ("clip_score", "retrieval_accuracy")
_IN_SHORT = ("frechet_distance", "kernel_distance", "accuracy", *_OF_TEXTS)
_OF_MIXTURE = ("sliced_wasserstein", "mode_weights")
_FURTHER = (
    "frechet_distance_at_infinity",
    "precision",
    "recall",
    "density",
    "coverage",
    "inception_score",
    "cmmd",
    *_OF_MIXTURE,
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
            begun: call it with a number before each batch: the watchdog then sees that a long
                measurement does not hang, and if training should stop, it raises an error that
                ends the measurement. Above 0 for batches that every process has, 0 for others.

        Returns:
            The value of each of `metrics`; NaN for one that can't be measured.
        """
        ...


def evaluators_of(config: ConfigDict) -> dict[str, Evaluator]:
    """The evaluators of a config by name.

    Raises:
        UserError: one can't be built, or is not an evaluator.
    """
    built = build(config.evaluators, dict, "config.evaluators")
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
        metrics: any of the metrics of docs/evaluation.md. All but the Fréchet distance, the kernel
            distance and the accuracy take longer, because they search for nearest neighbours among
            real images.
        every_steps: the steps from one measurement to the next; by default 1,000.
        num_samples: the number of samples; by default 1,000. Compare values of equal numbers only:
            the Fréchet distance falls as it grows.
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
        """Refuses metrics that do not exist or can't be computed, and weights that are not kept.

        Raises:
            UserError: the first of them.
        """
        if not self.metrics:
            raise UserError("metrics is empty: name one, like frechet_distance")
        for name in self.metrics:
            choose(dict.fromkeys((*_IN_SHORT, *_FURTHER)), name, "metric of samples")
        _check_weights(run, self.weights)
        of_mixture = [name for name in self.metrics if name in _OF_MIXTURE]
        if of_mixture and dataset.mixture is None:
            raise UserError(
                f"there is no {of_mixture[0]} of {dataset.name}: it needs data whose true "
                "distribution is known"
            )
        if not {"accuracy", "cmmd", *_OF_TEXTS} & set(self.metrics):
            return  # An extractor may be a large file.
        extractor = own_extractor(run.config, dataset)
        classes = dataset.num_classes and extractor.test_accuracy is not None
        if "accuracy" in self.metrics and not classes:
            raise UserError(
                f"there is no accuracy of {dataset.name} by {extractor.name}: it needs "
                "classes and a classifier of these"
            )
        of_texts = [name for name in self.metrics if name in _OF_TEXTS]
        have_texts = own_prompts(run.config) or dataset.test.captions
        if of_texts and (extractor.texts is None or not have_texts):
            lacking = "prompts or captions" if extractor.texts else "the extractor clip_folder"
            raise UserError(f"there is no {of_texts[0]} by {extractor.name}: it needs {lacking}")
        if "cmmd" in self.metrics and not extractor.for_cmmd:
            raise UserError(f"there is no cmmd by {extractor.name}: it needs features of CLIP")

    def __call__(self, run: Run, dataset: DataSet, begun: Begun) -> dict[str, float]:
        """Draws samples and compares them with the real images."""
        real = self._reference(run, dataset, begun)
        wired, settings = run.parts.wired, run.config.evaluation
        shares = label_shares(own_mix(run.config), wired, dataset, real.class_counts)
        labels = proportional_labels(self.num_samples, shares)
        samples = wanted_samples(wired, lambda: dataset, labels, own_prompts(run.config))
        seed = noise_seed(run.config.seed, settings.seed)
        request = Request(samples.condition, seed, samples.source)
        model = run.model(self.weights or None)
        images = model.batches(run.recipe, request, settings.batch_size, begun)
        found = metrics.compare(
            Batches(len(request), images),
            samples.labels if dataset.num_classes else None,
            real,
            texts=samples.texts,
            all_metrics=any(name in _FURTHER for name in self.metrics),
        )
        return {name: _value(found[name]) for name in self.metrics}

    def _reference(self, run: Run, dataset: DataSet, begun: Begun) -> Reference:
        """The real images and their features, made at the first call."""
        if not self._known or self._known[0] is not dataset:
            extractor = own_extractor(run.config, dataset)
            self._known[:] = (
                dataset, extractor, reference_of(dataset, extractor, lambda: begun(0))
            )  # fmt: skip
        _, extractor, real = self._known
        return replace(real, extractor=with_beat(lambda: begun(0), extractor))


@dataclass(frozen=True)
class Validation:
    """The validation loss: the error on test images, as the mean over log-SNR.

        loss = mean over λ of (D_space/s)²·mean_pixels (x0_predicted - x0)²

    `diffjax.studies.validation` explains it, and why runs of any objective may be compared by it.
    It needs no samples. The same images, noise and log-SNRs are used at each step.

    Args:
        every_steps: the steps from one measurement to the next; by default 1,000.
        num_images: the number of test images, evenly spaced; by default 500, at least 2.
        space: the target whose error is measured (`choices.TARGETS`); for `noise`, the default, the
            loss is the integrand of the variational bound.
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
        if reason := validation.unfit(run.parts.wired.objective.traits):
            raise UserError(f"this run {reason}")
        if len(dataset.test) < FEWEST_IMAGES:
            raise UserError(
                f"the validation loss is that of test images, and {dataset.name} has "
                f"{len(dataset.test)}: it needs {FEWEST_IMAGES}"
            )

    def __call__(self, run: Run, dataset: DataSet, begun: Begun) -> dict[str, float]:
        """Measures the error on test images."""
        wired = run.parts.wired
        if not self._known or self._known[0] is not wired:
            space = build(choose(choices.TARGETS, self.space, "target"))
            key = jax.random.key(self.seed)
            loss = validation.LossByLogSNR(
                wired.predict,
                wired.path,
                key,
                {self.space: space},
                place=batch_sharding(run.parts.mesh),
            )
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
    """The number of a metric, without its provenance; NaN if it could not be computed."""
    value = found["value"] if isinstance(found, Mapping) else found
    return float("nan") if value is None else float(value)
