"""All numbers of one set of samples, each with what it was measured against."""

from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import jax
import numpy as np

import diffjax
from diffjax.data import DataSet, all_images, to_float, to_uint8
from diffjax.errors import UserError
from diffjax.evaluation.copying import data_copying, inauthentic
from diffjax.evaluation.distances import (
    KernelDistance,
    Statistics,
    frechet_distance_from_root,
    kernel_distance,
    statistics,
    symmetric_root,
)
from diffjax.evaluation.extrapolation import extrapolated_distance, fewest_samples
from diffjax.evaluation.features import Extractor, check_images
from diffjax.evaluation.manifolds import manifold_scores
from diffjax.evaluation.neighbours import memorisation, nearest
from diffjax.evaluation.scores import inception_score
from diffjax.evaluation.seen import MOST_FEATURES, Batches, see, thinned_rows
from diffjax.evaluation.stored import Arrays, stored

_K = 5  # of Naeem et al.
_MOST_ON_MANIFOLDS = 10_000  # as theirs; the cost grows with the square
_FORMAT = 1  # of what is stored of a data set
_NUM_SPLITS = 10  # of Salimans et al.
_NUM_CELLS = 5


@dataclass(frozen=True)
class Reference:
    """The real images that samples are held against, and how far apart their own halves are.

    Attributes:
        name: data set.
        extractor: what the features were made with.
        train_images: `[N, H, W, C]` float32 in [-1, 1].
        train_features: `[min(N, 10,000), F]` float32, drawn by the seed.
        train_statistics: of the features of all N.
        train_root: the symmetric root of their covariance.
        train_sha256: fingerprint of the train split.
        test_features: `[M, F]` float32.
        test_logits: `[M, K]` float32; None where the extractor has none.
        some_test_images: `[L, H, W, C]` float32, those whose nearest train images were looked up.
        test_neighbours: their indices `[L, 2]` and distances `[L, 2]`, from `nearest`.
        kernel_floor: the kernel distance between the test and the train split.
        max_neighbour_images: samples whose nearest train images are looked up.
        seed: of every random thinning.
        sharding: of a batch of images over devices, so that each looks at its rows.
    """

    name: str
    extractor: Extractor
    train_images: np.ndarray
    train_features: np.ndarray
    train_statistics: Statistics
    train_root: np.ndarray
    train_sha256: str
    test_features: np.ndarray
    test_logits: np.ndarray | None
    some_test_images: np.ndarray
    test_neighbours: tuple[np.ndarray, np.ndarray]
    kernel_floor: KernelDistance
    max_neighbour_images: int
    seed: int
    sharding: jax.sharding.Sharding | None = None


def reference(
    dataset: DataSet,
    extractor: Extractor,
    *,
    max_images: int = 60_000,
    max_neighbour_images: int = 1000,
    seed: int = 0,
    folder: str | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Reference:
    """Extracts what is needed of a data set, once, for any number of `compare`s.

    Args:
        dataset: samples are held against its real training images; its test split gives the floors.
        extractor: images to features.
        max_images: of each split; of a larger one that many, evenly spaced.
        max_neighbour_images: test images whose nearest train images are looked up.
        seed: of the random choice of images and samples.
        folder: where what was extracted is kept for other processes and later ones, such as
            `diffjax.evaluation.stored.FOLDER`; None keeps nothing.
        sharding: of a batch of images over devices of this process; None looks on one.

    Raises:
        UserError: images of another shape than the extractor takes, or fewer than 3 in a split.
    """
    train_images, _ = all_images(dataset.reference, max_images)
    test_images, _ = all_images(dataset.test, max_images)
    some_test_images = thin(test_images, max_neighbour_images, seed)
    train_sha256 = dataset.reference.fingerprint()
    facts = {
        "format": _FORMAT,
        "version": diffjax.__version__,
        "backend": jax.default_backend(),
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "train_sha256": train_sha256,
        "test_sha256": dataset.test.fingerprint(),
        "max_images": max_images,
        "max_neighbour_images": max_neighbour_images,
        "max_features": MOST_FEATURES,
        "seed": seed,
    }
    make = partial(
        _extracted, train_images, test_images, some_test_images, extractor, seed, sharding
    )
    found = stored(folder, facts, make)
    floor = found["kernel_floor"]
    return Reference(
        name=dataset.name,
        extractor=extractor,
        train_images=train_images,
        train_features=found["train_features"],
        train_statistics=Statistics(
            found["train_mean"], found["train_cov"], int(found["train_count"])
        ),
        train_root=found["train_root"],
        train_sha256=train_sha256,
        test_features=found["test_features"],
        test_logits=found.get("test_logits"),
        some_test_images=some_test_images,
        test_neighbours=(found["neighbour_indices"], found["neighbour_distances"]),
        kernel_floor=KernelDistance(float(floor[0]), float(floor[1]), int(floor[2]), int(floor[3])),
        max_neighbour_images=max_neighbour_images,
        seed=seed,
        sharding=sharding,
    )


def _extracted(
    train_images: np.ndarray,
    test_images: np.ndarray,
    some_test_images: np.ndarray,
    extractor: Extractor,
    seed: int,
    sharding: jax.sharding.Sharding | None,
) -> Arrays:
    """What takes long of a data set."""
    train = see(Batches.of(train_images), extractor, seed=seed, most_images=0, sharding=sharding)
    test_features, test_logits = extractor.extract(test_images, sharding)
    indices, distances = nearest(some_test_images, train_images, k=2)
    floor = kernel_distance(test_features, train.features, seed=seed)
    mean, cov, count = train.statistics
    return {
        "train_features": train.features,
        "train_mean": mean,
        "train_cov": cov,
        "train_count": np.array(count),
        "train_root": symmetric_root(cov),
        "test_features": test_features,
        **({} if test_logits is None else {"test_logits": test_logits}),
        "neighbour_indices": indices,
        "neighbour_distances": distances,
        "kernel_floor": np.array(floor),
    }


def compare(
    samples: np.ndarray,
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
        samples: `[N, H, W, C]` float, meant to lie in [-1, 1]; N >= 3.
        labels: `[N]`, the class that each sample was asked to be; None if there was no condition.
        reference: from `reference(dataset, extractor)`; the samples go through its extractor.
        round_to_uint8: False keeps the samples' own levels (they are still clipped).
        in_depth: False leaves it at the accuracy and the two distances at the number of samples.

    Returns:
        Plain JSON: `accuracy` in [0, 1] (None without labels or classifier) with its 95 % Wilson
        interval and the classifier's own test accuracy; `frechet_distance`, `kernel_distance`,
        `frechet_distance_at_infinity`, `precision`, `recall`, `density`, `coverage` and
        `inception_score`, each with `value`, `floor` (the same of real test images, at most as
        many as there are samples but for the kernel distance) and `provenance`; `neighbours` with
        the figures of memorisation. What can't be had of so few samples, or without logits, is
        None. docs/evaluation.md says what each means.

    Raises:
        UserError: too few samples, another shape, labels that do not fit, pixels not finite.
    """
    extractor = reference.extractor
    check_images(samples, reference.train_images.shape[1:], f"the reference {reference.name}")
    samples = np.clip(samples, -1.0, 1.0).astype(np.float32)
    if round_to_uint8:
        samples = to_float(to_uint8(samples))
    features, logits = extractor.extract(samples)
    kernel = kernel_distance(features, reference.train_features, seed=reference.seed)
    provenance = {
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "num_features": features.shape[1],
        **extractor.provenance,
        "value_range": "[-1,1]",
        "rounding": "uint8" if round_to_uint8 else "none",
        "reference": f"{reference.name}/train",
        "reference_sha256": reference.train_sha256,
        "seed": reference.seed,
    }
    # The Fréchet distance falls with the number of images, so its floor uses as many.
    test_features = thin(reference.test_features, len(samples), reference.seed)
    frechet_counts = _counts(len(samples), len(test_features), reference.train_statistics.n)
    floor = reference.kernel_floor
    short = {
        "num_samples": len(samples),
        **_accuracy(logits, labels, len(samples)),
        "classifier_test_accuracy": extractor.test_accuracy,
        "frechet_distance": {
            "value": _frechet(statistics(features), reference),
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
        "frechet_distance_at_infinity": _at_infinity(features, reference, provenance),
        **_manifolds(features, reference, provenance),
        "inception_score": _inception_score(logits, reference, provenance),
        "neighbours": _neighbours(samples, reference),
    }


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


def thin(images: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most `most` of the images, drawn without replacement, in their order."""
    if len(images) <= most:
        return images
    return images[thinned_rows(len(images), most, seed)]


def _accuracy(logits: np.ndarray | None, labels: np.ndarray | None, n: int) -> dict[str, Any]:
    if labels is not None and labels.shape != (n,):
        raise UserError(f"{n} samples come with labels of shape {list(labels.shape)}")
    if logits is None or labels is None:
        return {"accuracy": None, "accuracy_interval": None}
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise UserError(f"labels must be 0 to {logits.shape[1] - 1}, the classifier's classes")
    num_right = int((logits.argmax(1) == labels).sum())
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


def _inception_score(
    logits: np.ndarray | None, reference: Reference, provenance: dict[str, Any]
) -> dict[str, Any] | None:
    """On the extractor's own classes; None without them, or of fewer samples than splits."""
    if logits is None or reference.test_logits is None or len(logits) < _NUM_SPLITS:
        return None
    found = inception_score(logits, num_splits=_NUM_SPLITS, seed=reference.seed)
    test_logits, floor = thin(reference.test_logits, len(logits), reference.seed), None
    if len(test_logits) >= _NUM_SPLITS:
        floor = inception_score(test_logits, num_splits=_NUM_SPLITS, seed=reference.seed).value
    return {
        "value": found.value,
        "standard_deviation": found.standard_deviation,
        "floor": floor,
        "provenance": provenance
        | _counts(len(logits), len(test_logits), 0)
        | {
            "definition": "arXiv:1606.03498",
            "num_splits": _NUM_SPLITS,
        },
    }


def _neighbours(samples: np.ndarray, reference: Reference) -> dict[str, Any]:
    some = thin(samples, reference.max_neighbour_images, reference.seed)
    train = reference.train_images
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
