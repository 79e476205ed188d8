"""Metrics of a run's own recipe in addition to accuracy and the Fréchet and kernel distances."""

from typing import Any

import jax
import numpy as np

from diffjax.evaluation.image_statistics import CollectedStatistics
from diffjax.evaluation.reference import Reference, thin
from diffjax.evaluation.scores.copying import data_copying, inauthentic
from diffjax.evaluation.scores.distances import gaussian_kernel_distance
from diffjax.evaluation.scores.extrapolation import extrapolated_distance, fewest_samples
from diffjax.evaluation.scores.inception_score import NUM_SPLITS, inception_score
from diffjax.evaluation.scores.manifolds import manifold_scores
from diffjax.evaluation.scores.mixtures import mode_weights, sliced_wasserstein_to
from diffjax.evaluation.scores.neighbours import copied, memorisation, nearest_neighbours

_K = 5  # of Naeem et al.
_MOST_ON_MANIFOLDS = 10_000  # as in Naeem et al.; the cost grows with the square
_NUM_CELLS = 5
_NUM_DIRECTIONS = 100


def further_metrics(
    collected: CollectedStatistics, reference: Reference, provenance: dict[str, Any]
) -> dict[str, Any]:
    """All metrics on features by name, with floors and provenance; None if not available.

    Args:
        collected: statistics of the samples.
        reference: the real images that samples are compared with.
        provenance: provenance that all metrics share.
    """
    return {
        "frechet_distance_at_infinity": _at_infinity(collected.features, reference, provenance),
        **_manifolds(collected.features, reference, provenance),
        "cmmd": _cmmd(collected.features, reference, provenance),
        "inception_score": _inception_score(collected, reference, provenance),
        **_of_mixture(collected.images, reference, provenance),
    }


def image_counts(
    num_samples: int, num_floor_images: int, num_reference_images: int
) -> dict[str, int]:
    """The part of a metric's provenance that contains the numbers of images."""
    return {
        "num_samples": num_samples,
        "num_floor_images": num_floor_images,
        "num_reference_images": num_reference_images,
    }


def _at_infinity(
    features: np.ndarray, reference: Reference, provenance: dict[str, Any]
) -> dict[str, Any] | None:
    """The extrapolated Fréchet distance and its floor; each is None if there are too few images."""
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
        | image_counts(
            len(features), len(test_features) if floor else 0, reference.train_statistics.n
        )
        | {
            "definition": "arXiv:1911.07023",
            "sizes_of_parts": list(found.sizes),
        },
    }


def _manifolds(
    features: np.ndarray, reference: Reference, provenance: dict[str, Any]
) -> dict[str, Any]:
    """Precision, recall, density and coverage with equally many train images; None for too few."""

    def against_as_many(features: np.ndarray, most: int) -> tuple[int, dict[str, float]]:
        n = min(most, len(features), len(reference.train_features))
        if n <= _K:
            return 0, {}
        real, ours = (thin(x, n, reference.seed) for x in (reference.train_features, features))
        return n, manifold_scores(real, ours, k=_K)._asdict()

    n, found = against_as_many(features, _MOST_ON_MANIFOLDS)
    num_floor, floor = against_as_many(reference.test_features, n)
    stated = provenance | image_counts(n, num_floor, n)
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
    """CMMD if the features are those of CLIP, else None."""
    if not reference.extractor.for_cmmd:
        return None
    train = reference.train_features
    test_features = thin(reference.test_features, len(features), reference.seed)
    return {
        "value": gaussian_kernel_distance(features, train),
        "floor": gaussian_kernel_distance(test_features, train) if len(test_features) else None,
        "provenance": provenance
        | image_counts(len(features), len(test_features), len(train))
        | {"definition": "arXiv:2401.09603"},
    }


def _inception_score(
    collected: CollectedStatistics, reference: Reference, provenance: dict[str, Any]
) -> dict[str, Any] | None:
    """Inception score on the extractor's classes; None without logits or for too few samples."""
    if collected.score is None or reference.test_logits is None:
        return None
    test_logits, floor = thin(reference.test_logits, collected.num_images, reference.seed), None
    if len(test_logits) >= NUM_SPLITS:
        floor = inception_score(test_logits, seed=reference.seed).value
    return {
        "value": collected.score.value,
        "standard_deviation": collected.score.standard_deviation,
        "floor": floor,
        "provenance": provenance
        | image_counts(collected.num_images, len(test_logits), 0)
        | {
            "definition": "arXiv:1606.03498",
            "num_splits": NUM_SPLITS,
        },
    }


def memorisation_metrics(
    collected: CollectedStatistics, reference: Reference, provenance: dict[str, Any]
) -> dict[str, Any]:
    """Metrics of memorisation, computed on pixels, so they do not depend on the extractor.

    Args:
        collected: statistics of the samples.
        reference: the real images; its training images are read again.
        provenance: provenance that all metrics share.
    """
    some = thin(collected.images, reference.max_neighbour_images, reference.seed)
    train = reference.train_images
    indices, distances = nearest_neighbours(some, train, k=2)
    test_distances = reference.test_neighbours[1]
    by_cell = data_copying(
        some, train, reference.some_test_images, num_cells=_NUM_CELLS, seed=reference.seed
    )
    how = {
        "num_cells": _NUM_CELLS,
        "seed": reference.seed,
        "space": "pixels" if reference.codec.bounded else "values",
        **image_counts(len(some), len(test_distances), len(train)),
    }
    # There are no features: only the provenance of the images is shared.
    shared = (
        *reference.codec.facts,
        "value_range",
        "rounding",
        "reference",
        "reference_sha256",
        "labels",
    )
    stated = {key: provenance[key] for key in shared}
    tested = len(test_distances) > 0
    memory = {"closer_than_test": None, "distance_ratio": None, "copied_floor": None}
    return {
        **(memorisation(distances, test_distances)._asdict() if tested else memory),
        "copied": copied(distances),
        "inauthentic": inauthentic(indices, distances, train),
        "inauthentic_floor": reference.inauthentic_floor,
        "data_copying": by_cell.value,
        "data_copying_tested_share": by_cell.tested_share,
        **how,
        # Unlike for other metrics, the test images are part of the values, not only of the floor.
        "provenance": stated
        | how
        | {"test_sha256": reference.test_sha256, "num_test_images": len(test_distances)},
    }


def _of_mixture(
    images: np.ndarray, reference: Reference, provenance: dict[str, Any]
) -> dict[str, Any]:
    """Metrics with respect to the true distribution, if it is known; else an empty dict."""
    mixture = reference.mixture
    if mixture is None:
        return {}
    # Equally many exact draws are what a perfect generator produces.
    real = np.asarray(mixture.draw(jax.random.key(reference.seed), len(images)))
    shared = (*reference.codec.facts, "value_range", "rounding", "labels", "seed")
    stated = {key: provenance[key] for key in shared}
    stated |= image_counts(len(images), len(real), 0) | {
        "reference": f"{reference.name}, its true distribution"
    }
    distance, floor = (
        sliced_wasserstein_to(mixture, x, num_directions=_NUM_DIRECTIONS, seed=reference.seed)
        for x in (images, real)
    )
    weights, floor_weights = (mode_weights(x, mixture) for x in (images, real))
    return {
        "sliced_wasserstein": {
            "value": distance.value,
            "floor": floor.value,
            "provenance": stated | {"num_directions": _NUM_DIRECTIONS},
        },
        "mode_weights": {
            "value": weights.total_variation,
            "floor": floor_weights.total_variation,
            "found": weights.found.tolist(),
            "exact": weights.exact.tolist(),
            "standard_errors": weights.standard_error.tolist(),
            "provenance": stated,
        },
    }
