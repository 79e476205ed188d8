"""All numbers of one set of samples, each with what it was measured against."""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from diffjax.data import DataSet, all_images, to_float, to_uint8
from diffjax.errors import UserError
from diffjax.evaluation.distances import (
    KernelDistance,
    Statistics,
    frechet_distance,
    kernel_distance,
    statistics,
)
from diffjax.evaluation.features import Extractor, check_images
from diffjax.evaluation.neighbours import memorisation, nearest


@dataclass(frozen=True)
class Reference:
    """The real images that samples are held against, and how far apart their own halves are.

    Attributes:
        name: data set.
        extractor: what the features were made with.
        train_images: `[N, H, W, C]` float32 in [-1, 1].
        train_features: `[N, F]` float32.
        train_statistics: of the train features.
        train_sha256: fingerprint of the train split.
        test_features: `[M, F]` float32.
        test_neighbour_distances: `[M, 2]` float32, of test images to the nearest train images.
        kernel_floor: the kernel distance between the test and the train split.
        max_neighbour_images: samples whose nearest train images are looked up.
        seed: of every random thinning.
    """

    name: str
    extractor: Extractor
    train_images: np.ndarray
    train_features: np.ndarray
    train_statistics: Statistics
    train_sha256: str
    test_features: np.ndarray
    test_neighbour_distances: np.ndarray
    kernel_floor: KernelDistance
    max_neighbour_images: int
    seed: int


def reference(
    dataset: DataSet,
    extractor: Extractor,
    *,
    max_images: int = 60_000,
    max_neighbour_images: int = 1000,
    seed: int = 0,
) -> Reference:
    """Extracts what is needed of a data set, once, for any number of `compare`s.

    Args:
        dataset: samples are held against its real training images; its test split gives the floors.
        extractor: images to features.
        max_images: of each split; of a larger one that many, evenly spaced.
        max_neighbour_images: test images whose nearest train images are looked up.
        seed: of the random choice of test images and samples.

    Raises:
        UserError: images of another shape than the extractor takes, or fewer than 3 in a split.
    """
    train_images, _ = all_images(dataset.reference, max_images)
    test_images, _ = all_images(dataset.test, max_images)
    train_features = extractor.features(train_images)
    test_features = extractor.features(test_images)
    some_test_images = thin(test_images, max_neighbour_images, seed)
    return Reference(
        name=dataset.name,
        extractor=extractor,
        train_images=train_images,
        train_features=train_features,
        train_statistics=statistics(train_features),
        train_sha256=dataset.reference.fingerprint(),
        test_features=test_features,
        test_neighbour_distances=nearest(some_test_images, train_images, k=2)[1],
        kernel_floor=kernel_distance(test_features, train_features, seed=seed),
        max_neighbour_images=max_neighbour_images,
        seed=seed,
    )


def compare(
    samples: np.ndarray,
    labels: np.ndarray | None,
    reference: Reference,
    *,
    round_to_uint8: bool = True,
) -> dict[str, Any]:
    """Accuracy, Fréchet and kernel distance, and memorisation of one set of samples.

    Samples are first clipped to [-1, 1] and rounded to the 256 levels that an image file has,
    because the real images have no others.

    Args:
        samples: `[N, H, W, C]` float, meant to lie in [-1, 1]; N >= 3.
        labels: `[N]`, the class that each sample was asked to be; None if there was no condition.
        reference: from `reference(dataset, extractor)`; the samples go through its extractor.
        round_to_uint8: False keeps the samples' own levels (they are still clipped).

    Returns:
        Plain JSON: `accuracy` in [0, 1] (None without labels or classifier) with its 95 % Wilson
        interval and the classifier's own test accuracy; `frechet_distance` and `kernel_distance`,
        each with `value`, `floor` (the same distance from real test images to the train split; for
        the Fréchet distance at most as many as there are samples) and `provenance`; `neighbours`
        with the figures of `Memorisation`. docs/evaluation.md says what each means.

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
    }
    # The Fréchet distance falls with the number of images, so its floor uses as many.
    test_features = thin(reference.test_features, len(samples), reference.seed)
    frechet_counts = _counts(len(samples), len(test_features), reference.train_statistics.n)
    floor = reference.kernel_floor
    return {
        "num_samples": len(samples),
        **_accuracy(logits, labels, len(samples)),
        "classifier_test_accuracy": extractor.test_accuracy,
        "frechet_distance": {
            "value": _frechet(features, reference.train_statistics),
            "floor": _frechet(test_features, reference.train_statistics),
            "provenance": provenance | frechet_counts,
        },
        "kernel_distance": {
            "value": kernel.value,
            "standard_error": kernel.standard_error,
            "floor": floor.value,
            "floor_standard_error": floor.standard_error,
            "provenance": provenance | _counts(kernel.num_1, floor.num_1, kernel.num_2),
        },
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
    return images[np.sort(np.random.default_rng(seed).choice(len(images), most, replace=False))]


def _accuracy(logits: np.ndarray | None, labels: np.ndarray | None, n: int) -> dict[str, Any]:
    if labels is not None and labels.shape != (n,):
        raise UserError(f"{n} samples come with labels of shape {list(labels.shape)}")
    if logits is None or labels is None:
        return {"accuracy": None, "accuracy_interval": None}
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise UserError(f"labels must be 0 to {logits.shape[1] - 1}, the classifier's classes")
    num_right = int((logits.argmax(1) == labels).sum())
    return {"accuracy": num_right / n, "accuracy_interval": list(wilson_interval(num_right, n))}


def _neighbours(samples: np.ndarray, reference: Reference) -> dict[str, Any]:
    some = thin(samples, reference.max_neighbour_images, reference.seed)
    test_distances = reference.test_neighbour_distances
    distances = nearest(some, reference.train_images, k=2)[1]
    return {
        **memorisation(distances, test_distances)._asdict(),
        "space": "pixels",
        **_counts(len(some), len(test_distances), len(reference.train_images)),
    }


def _counts(num_samples: int, num_floor_images: int, num_reference_images: int) -> dict[str, int]:
    return {
        "num_samples": num_samples,
        "num_floor_images": num_floor_images,
        "num_reference_images": num_reference_images,
    }


def _frechet(features: np.ndarray, train: Statistics) -> float:
    mean, cov, _ = statistics(features)
    return frechet_distance(mean, cov, train.mean, train.cov)
