"""All numbers of one set of samples, each with what it was measured against."""

from collections.abc import Iterator
from math import sqrt
from typing import Any

import numpy as np

from diffjax.data import to_float, to_uint8
from diffjax.errors import UserError
from diffjax.evaluation.copying import data_copying, inauthentic
from diffjax.evaluation.distances import (
    Statistics,
    frechet_distance_from_root,
    gaussian_kernel_distance,
    kernel_distance,
    statistics,
)
from diffjax.evaluation.extrapolation import extrapolated_distance, fewest_samples
from diffjax.evaluation.features import check_images
from diffjax.evaluation.manifolds import manifold_scores
from diffjax.evaluation.neighbours import memorisation, nearest
from diffjax.evaluation.reference import Reference as Reference
from diffjax.evaluation.reference import reference as reference
from diffjax.evaluation.reference import thin
from diffjax.evaluation.scores import inception_score
from diffjax.evaluation.seen import Batches, Seen, see

_K = 5  # of Naeem et al.
_MOST_ON_MANIFOLDS = 10_000  # as theirs; the cost grows with the square
_NUM_SPLITS = 10  # of Salimans et al.
_NUM_CELLS = 5


def compare(
    samples: np.ndarray | Batches,
    labels: np.ndarray | None,
    reference: Reference,
    *,
    round_to_uint8: bool = True,
    in_depth: bool = True,
) -> dict[str, Any]:
    """All numbers of one set of samples: accuracy, distances, variety, memorisation.

    Samples are first clipped to [-1, 1] and rounded to the 256 levels that an image file has,
    because the real images have no others.

    Args:
        samples: `[N, H, W, C]` float, meant to lie in [-1, 1]; N >= 3. As `Batches`, they never
            are in memory all at once: distances, accuracy and Inception score see each of them, and
            what needs pairs of features at most 10,000, drawn by the seed.
        labels: `[N]`, the class that each sample was asked to be; None if there was no condition.
        reference: from `reference(dataset, extractor)`; the samples go through its extractor.
        round_to_uint8: False keeps the samples' own levels (they are still clipped).
        in_depth: False leaves it at the accuracy and the two distances at the number of samples.

    Returns:
        Plain JSON: `accuracy` in [0, 1] (None without labels or classifier) with its 95 % Wilson
        interval and the classifier's own test accuracy; `frechet_distance`, `kernel_distance`,
        `frechet_distance_at_infinity`, `precision`, `recall`, `density`, `coverage`, `cmmd` (on
        CLIP's features alone) and `inception_score`, each with `value`, `floor` (the same of real
        test images, at most as many as there are samples but for the kernel distance) and
        `provenance`; `neighbours` with the figures of memorisation. What can't be had of so few
        samples, or without logits, is None. docs/evaluation.md says what each means.

    Raises:
        UserError: too few samples, another shape, labels that do not fit, pixels not finite.
    """
    extractor = reference.extractor
    if not isinstance(samples, Batches):
        check_images(samples, reference.train_images.shape[1:], f"the reference {reference.name}")
        samples = Batches.of(samples)
    n = samples.num_images
    if labels is not None and labels.shape != (n,):
        raise UserError(f"{n} samples come with labels of shape {list(labels.shape)}")
    seen = see(
        _as_image_files(samples, reference, round_to_uint8),
        extractor,
        seed=reference.seed,
        most_images=reference.max_neighbour_images if in_depth else 0,
        num_splits=_NUM_SPLITS,
        sharding=reference.sharding,
    )
    kernel = kernel_distance(seen.features, reference.train_features, seed=reference.seed)
    provenance = {
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "num_features": seen.features.shape[1],
        **extractor.provenance,
        "value_range": "[-1,1]",
        "rounding": "uint8" if round_to_uint8 else "none",
        "reference": f"{reference.name}/train",
        "reference_sha256": reference.train_sha256,
        "seed": reference.seed,
    }
    # The Fréchet distance falls with the number of images, so its floor uses as many.
    test_features = thin(reference.test_features, n, reference.seed)
    frechet_counts = _counts(n, len(test_features), reference.train_statistics.n)
    floor = reference.kernel_floor
    short = {
        "num_samples": n,
        **_accuracy(seen.predicted, labels, reference),
        "classifier_test_accuracy": extractor.test_accuracy,
        "frechet_distance": {
            "value": _frechet(seen.statistics, reference),
            "floor": _frechet(statistics(test_features), reference),
            "provenance": provenance | frechet_counts | {"definition": "arXiv:1706.08500"},
        },
        "kernel_distance": {
            "value": kernel.value,
            "standard_error": kernel.standard_error,
            "floor": floor.value,
            "floor_standard_error": floor.standard_error,
            "provenance": provenance
            | _counts(kernel.num_1, floor.num_1, kernel.num_2)
            | {"definition": "arXiv:1801.01401"},
        },
    }
    if not in_depth:
        return short
    return short | {
        "frechet_distance_at_infinity": _at_infinity(seen.features, reference, provenance),
        **_manifolds(seen.features, reference, provenance),
        "cmmd": _cmmd(seen.features, reference, provenance),
        "inception_score": _inception_score(seen, reference, provenance),
        "neighbours": _neighbours(seen, reference),
    }


def _as_image_files(samples: Batches, reference: Reference, round_to_uint8: bool) -> Batches:
    """The samples as they would be read from files, checked."""
    shape, whose = reference.train_images.shape[1:], f"the reference {reference.name}"

    def read() -> Iterator[np.ndarray]:
        for batch in samples.batches:
            check_images(batch, shape, whose)
            batch = np.clip(batch, -1.0, 1.0).astype(np.float32)
            yield to_float(to_uint8(batch)) if round_to_uint8 else batch

    return Batches(samples.num_images, read())


def wilson_interval(num_right: int, num_all: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927); z = 1.96 covers 95 %.

    Example:
        >>> tuple(round(end, 3) for end in wilson_interval(99, 100))
        (0.946, 0.998)
    """
    share = num_right / num_all
    centre = (share + z**2 / (2 * num_all)) / (1 + z**2 / num_all)
    spread = sqrt(share * (1 - share) / num_all + z**2 / (4 * num_all**2))
    half = z * spread / (1 + z**2 / num_all)
    return max(0.0, centre - half), min(1.0, centre + half)


def _accuracy(
    predicted: np.ndarray | None, labels: np.ndarray | None, reference: Reference
) -> dict[str, Any]:
    if predicted is None or labels is None or reference.test_logits is None:
        return {"accuracy": None, "accuracy_interval": None}
    num_classes = reference.test_logits.shape[1]
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"labels must be 0 to {num_classes - 1}, the classifier's classes")
    n, num_right = len(labels), int((predicted == labels).sum())
    return {"accuracy": num_right / n, "accuracy_interval": list(wilson_interval(num_right, n))}


def _at_infinity(
    features: np.ndarray, reference: Reference, provenance: dict[str, Any]
) -> dict[str, Any] | None:
    """The extrapolated Fréchet distance; None of too few samples, its floor of test images too."""
    test_features = thin(reference.test_features, len(features), reference.seed)
    found, floor = (
        extrapolated_distance(x, reference.train_statistics, seed=reference.seed)
        if len(x) >= fewest_samples(x.shape[1])
        else None
        for x in (features, test_features)
    )
    if found is None:
        return None
    return {
        "value": found.value,
        "standard_error": found.standard_error,
        "floor": floor and floor.value,
        "floor_standard_error": floor and floor.standard_error,
        "provenance": provenance
        | _counts(len(features), len(test_features) if floor else 0, reference.train_statistics.n)
        | {
            "definition": "arXiv:1911.07023",
            "sizes_of_parts": list(found.sizes),
        },
    }


def _manifolds(
    features: np.ndarray, reference: Reference, provenance: dict[str, Any]
) -> dict[str, Any]:
    """Precision, recall, density and coverage against as many train images; None of too few."""

    def against_as_many(features: np.ndarray, most: int) -> tuple[int, dict[str, float]]:
        n = min(most, len(features), len(reference.train_features))
        if n <= _K:
            return 0, {}
        real, ours = (thin(x, n, reference.seed) for x in (reference.train_features, features))
        return n, manifold_scores(real, ours, k=_K)._asdict()

    n, found = against_as_many(features, _MOST_ON_MANIFOLDS)
    num_floor, floor = against_as_many(reference.test_features, n)
    stated = provenance | _counts(n, num_floor, n)
    papers = {"precision": "1904.06991", "recall": "1904.06991"}
    papers |= {"density": "2002.09797", "coverage": "2002.09797"}
    return {
        name: {
            "value": found[name],
            "floor": floor.get(name),
            "provenance": stated | {"definition": f"arXiv:{paper}", "k": _K},
        }
        if found
        else None
        for name, paper in papers.items()
    }


def _cmmd(
    features: np.ndarray, reference: Reference, provenance: dict[str, Any]
) -> dict[str, Any] | None:
    """CMMD where the features are those of CLIP, else None."""
    if not reference.extractor.for_cmmd:
        return None
    train = reference.train_features
    test_features = thin(reference.test_features, len(features), reference.seed)
    return {
        "value": gaussian_kernel_distance(features, train),
        "floor": gaussian_kernel_distance(test_features, train),
        "provenance": provenance
        | _counts(len(features), len(test_features), len(train))
        | {"definition": "arXiv:2401.09603"},
    }


def _inception_score(
    seen: Seen, reference: Reference, provenance: dict[str, Any]
) -> dict[str, Any] | None:
    """On the extractor's own classes; None without them, or of fewer samples than splits."""
    if seen.score is None or reference.test_logits is None:
        return None
    test_logits, floor = thin(reference.test_logits, seen.num_images, reference.seed), None
    if len(test_logits) >= _NUM_SPLITS:
        floor = inception_score(test_logits, num_splits=_NUM_SPLITS, seed=reference.seed).value
    return {
        "value": seen.score.value,
        "standard_deviation": seen.score.standard_deviation,
        "floor": floor,
        "provenance": provenance
        | _counts(seen.num_images, len(test_logits), 0)
        | {
            "definition": "arXiv:1606.03498",
            "num_splits": _NUM_SPLITS,
        },
    }


def _neighbours(seen: Seen, reference: Reference) -> dict[str, Any]:
    some, train = seen.images, reference.train_images
    indices, distances = nearest(some, train, k=2)
    test_distances = reference.test_neighbours[1]
    by_cell = data_copying(
        some, train, reference.some_test_images, num_cells=_NUM_CELLS, seed=reference.seed
    )
    return {
        **memorisation(distances, test_distances)._asdict(),
        "inauthentic": inauthentic(indices, distances, train),
        "inauthentic_floor": inauthentic(*reference.test_neighbours, train),
        "data_copying": by_cell.value,
        "data_copying_tested_share": by_cell.tested_share,
        "num_cells": _NUM_CELLS,
        "seed": reference.seed,
        "space": "pixels",
        **_counts(len(some), len(test_distances), len(train)),
    }


def _counts(num_samples: int, num_floor_images: int, num_reference_images: int) -> dict[str, int]:
    return {
        "num_samples": num_samples,
        "num_floor_images": num_floor_images,
        "num_reference_images": num_reference_images,
    }


def _frechet(ours: Statistics, reference: Reference) -> float:
    train = reference.train_statistics
    return frechet_distance_from_root(
        train.mean, train.cov, reference.train_root, ours.mean, ours.cov
    )
