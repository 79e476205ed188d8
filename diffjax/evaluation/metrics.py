"""Computes all metrics of a set of samples, each with its floor and provenance."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from diffjax.data import to_float, to_uint8
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import check_images
from diffjax.evaluation.further_metrics import (
    further_metrics,
    image_counts,
    memorisation_metrics,
)
from diffjax.evaluation.image_statistics import (
    MOST_FEATURES,
    Batches,
    CollectedStatistics,
    collect_each,
)
from diffjax.evaluation.intervals import wilson_interval
from diffjax.evaluation.reference import Reference as Reference
from diffjax.evaluation.reference import reference as reference
from diffjax.evaluation.reference import thin
from diffjax.evaluation.scores.distances import (
    Statistics,
    frechet_distance_from_root,
    kernel_distance,
    statistics,
)
from diffjax.evaluation.scores.label_mix import label_mix, proportional_labels
from diffjax.evaluation.scores.text_scores import facts_of, text_metrics


def compare(
    samples: np.ndarray | Batches, labels: np.ndarray | None, reference: Reference, **how: Any
) -> dict[str, Any]:
    """Computes all metrics of a set of samples: accuracy, distances, diversity, memorisation.

    Example:
        >>> from diffjax.data import all_images, digits
        >>> from diffjax.evaluation.extractors.features import pixel_features
        >>> real = reference(digits(), pixel_features(4))
        >>> images, _ = all_images(digits().reference)
        >>> round(compare(images, None, real)["frechet_distance"]["value"], 6)
        0.0

    `how` and the result are as in `compare_each`, which accepts several references.
    """
    return compare_each(samples, labels, [reference], **how)[0]


def compare_each(
    samples: np.ndarray | Batches,
    labels: np.ndarray | None,
    references: Sequence[Reference],
    *,
    texts: Sequence[str] | None = None,
    round_to_uint8: bool = True,
    all_metrics: bool = True,
) -> list[dict[str, Any]]:
    """Computes all metrics of a set of samples with respect to one data set, for all extractors.

    Samples are first clipped to [-1, 1] and rounded to 256 levels, as in an image file, because the
    real images have the same levels. Samples that are not images (`Codec.bounded` is False) are not
    changed.

    Args:
        samples: `[N, H, W, C]` float, images in [-1, 1]; N >= 3. As `Batches`, they are never all
            in memory: distances, accuracy and Inception score use every sample, and metrics that
            need pairs of features use at most 10,000, drawn by the seed.
        labels: `[N]`, the class on which each sample was conditioned; None for unconditional ones.
        references: from `reference(dataset, extractor)`; each is compared on its extractor's
            features.
        texts: N texts, of each sample the one that it is to show; None where there are none.
        round_to_uint8: False keeps the samples' own levels (images are still clipped).
        all_metrics: False computes only accuracy, CLIP score, retrieval accuracy, Fréchet distance
            and kernel distance.

    Returns:
        For each reference a dict of plain JSON. `accuracy` in [0, 1] (None without labels or a
        classifier of these classes) has its 95 % Wilson interval and the classifier's own test
        accuracy. `clip_score` and `retrieval_accuracy` are None without texts, or where the
        extractor has no text encoder. The metrics `frechet_distance`, `kernel_distance`,
        `frechet_distance_at_infinity`, `precision`, `recall`, `density`, `coverage`, `cmmd` (on
        CLIP features only), `inception_score` and, if the true distribution is known,
        `sliced_wasserstein` and `mode_weights` each have `value`, `floor` and `provenance`. The
        floor is the same metric of real test images, at most as many as samples (except for the
        kernel distance). `neighbours` contains the metrics of memorisation. A metric for which
        there are too few samples or test images, or no logits, is None. docs/evaluation.md
        explains each metric.

    Raises:
        UserError: too few samples, another shape, labels that do not fit, values not finite.
    """
    first = references[0]
    if not isinstance(samples, Batches):
        check_images(samples, first.train_images.shape[1:], f"the reference {first.name}")
        samples = Batches.of(samples)
    n = samples.num_images
    if texts is not None and len(texts) != n:
        raise UserError(f"{n} samples come with {len(texts)} texts: each shows one")
    if labels is not None and labels.shape != (n,):
        raise UserError(f"{n} samples come with labels of shape {list(labels.shape)}")
    # Toy data are small, and their exact metrics profit from more samples.
    most_images = MOST_FEATURES if first.mixture is not None else first.max_neighbour_images
    each = collect_each(
        _as_image_files(samples, first, round_to_uint8),
        [real.extractor for real in references],
        seed=first.seed,
        most_images=most_images if all_metrics else 0,
        sharding=first.sharding,
        shared=first.shared,
    )
    # An unconditional model samples classes in the proportions of its training data.
    drawn = proportional_labels(n, first.class_counts) if labels is None else labels
    mix = label_mix(drawn, first.class_counts)
    facts = {} if texts is None else facts_of(texts)
    found, of_pixels = [], {}
    for collected, real in zip(each, references, strict=True):
        provenance = _provenance(real, collected.features.shape[1], round_to_uint8) | {
            "labels": mix,
            **facts,
        }
        numbers = _in_short(collected, labels, real, provenance)
        numbers |= text_metrics(collected, texts, real, provenance)
        if all_metrics:
            of_pixels = of_pixels or {
                "neighbours": memorisation_metrics(collected, real, provenance)
            }
            numbers |= further_metrics(collected, real, provenance) | of_pixels
        found.append(numbers)
    return found


def _provenance(reference: Reference, num_features: int, round_to_uint8: bool) -> dict[str, Any]:
    """The part of the provenance that all metrics share."""
    extractor, rounded = reference.extractor, round_to_uint8 and reference.codec.bounded
    return {
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "num_features": num_features,
        "resize": "none",
        **extractor.provenance,
        **reference.codec.facts,
        "value_range": "[-1,1]" if reference.codec.bounded else "any",
        "rounding": "uint8" if rounded else "none",
        "reference": f"{reference.name}/train",
        "reference_sha256": reference.train_sha256,
        "seed": reference.seed,
    }


def _in_short(
    collected: CollectedStatistics,
    labels: np.ndarray | None,
    reference: Reference,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Accuracy, Fréchet distance and kernel distance."""
    n = collected.num_images
    kernel = kernel_distance(collected.features, reference.train_features, seed=reference.seed)
    # The Fréchet distance falls with the number of images, so its floor uses equally many.
    test_features = thin(reference.test_features, n, reference.seed)
    frechet_counts = image_counts(n, len(test_features), reference.train_statistics.n)
    floor = reference.kernel_floor
    return {
        "num_samples": n,
        **_accuracy(collected.predicted, labels, reference, provenance),
        "classifier_test_accuracy": reference.extractor.test_accuracy,
        "frechet_distance": {
            "value": _frechet(collected.statistics, reference),
            "floor": _frechet(statistics(test_features), reference)
            if len(test_features) >= 2
            else None,
            "provenance": provenance | frechet_counts | {"definition": "arXiv:1706.08500"},
        },
        "kernel_distance": {
            "value": kernel.value,
            "standard_error": kernel.standard_error,
            "floor": floor and floor.value,
            "floor_standard_error": floor and floor.standard_error,
            "provenance": provenance
            | image_counts(kernel.num_1, floor.num_1 if floor else 0, kernel.num_2)
            | {"definition": "arXiv:1801.01401"},
        },
    }


def _as_image_files(samples: Batches, reference: Reference, round_to_uint8: bool) -> Batches:
    """Checks samples, and clips and rounds them as in an image file if the data are images."""
    shape, whose = reference.train_images.shape[1:], f"the reference {reference.name}"

    def read() -> Iterator[np.ndarray]:
        for batch in samples.batches:
            check_images(batch, shape, whose)
            if reference.codec.bounded:
                batch = np.clip(batch, -1.0, 1.0)
            batch = batch.astype(np.float32)
            rounded = round_to_uint8 and reference.codec.bounded
            yield to_float(to_uint8(batch)) if rounded else batch

    return Batches(samples.num_images, read())


def _accuracy(
    predicted: np.ndarray | None,
    labels: np.ndarray | None,
    reference: Reference,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    # A classifier with other classes, such as those of ImageNet, has no test accuracy here.
    of_these_classes = reference.extractor.test_accuracy is not None
    if predicted is None or labels is None or reference.test_logits is None or not of_these_classes:
        return {"accuracy": None, "accuracy_interval": None}
    num_classes = reference.test_logits.shape[1]
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"labels must be 0 to {num_classes - 1}, the classifier's classes")
    n, num_right = len(labels), int((predicted == labels).sum())
    return {
        "accuracy": num_right / n,
        "accuracy_interval": list(wilson_interval(num_right, n)),
        "accuracy_provenance": provenance | image_counts(n, 0, 0),
    }


def _frechet(ours: Statistics, reference: Reference) -> float:
    train = reference.train_statistics
    return frechet_distance_from_root(
        train.mean, train.cov, reference.train_root, ours.mean, ours.cov
    )
