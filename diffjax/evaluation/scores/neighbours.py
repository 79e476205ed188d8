"""Nearest training images, and metrics of memorisation that use their distances."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32

from diffjax.errors import UserError
from diffjax.evaluation.image_statistics import ImageSet

# Yoon et al. 2023 call a sample memorised below this ratio of its two nearest distances.
COPY_RATIO = 1.0 / 3.0


def nearest_neighbours(
    samples: np.ndarray,
    references: np.ndarray | ImageSet,
    *,
    k: int = 1,
    batch_size_images: int = 250,
) -> tuple[Int32[np.ndarray, " samples {k}"], Float32[np.ndarray, " samples {k}"]]:
    """The k nearest references of each sample, by Euclidean distance.

        |x - y|² = |x|² + |y|² - 2 x·y

    finds them with one matrix product per batch. Their distances are then recomputed from the
    difference, so that an exact copy has distance 0 without rounding error.

    Args:
        samples: `[N, ...]`, pixels or features.
        references: `[M, ...]`, the same shape after the first axis. With `ImageSet`, only one batch
            is in memory.
        k: number of neighbours, at most M.
        batch_size_images: samples in one matrix product with a batch of references.

    Returns:
        Indices `[N, k]` int32 and distances `[N, k]` float32, nearest first, in units of the
        input: for images, the root of the summed squared difference on the [-1, 1] range.

    Raises:
        UserError: shapes that do not fit, fewer than k references, or numbers that are not finite.

    Example:
        >>> real = np.array([[0.0], [1.0]])
        >>> indices, distances = nearest_neighbours(np.array([[0.75]]), real, k=2)
        >>> indices.tolist(), distances.tolist()
        ([[1, 0]], [[0.25, 0.75]])
    """
    references = ImageSet.of(references)
    if samples.shape[1:] != references.shape[1:]:
        raise UserError(
            f"samples {list(samples.shape)} and references {list(references.shape)} differ in shape"
        )
    if not 1 <= k <= len(references):
        raise UserError(f"{k} nearest of {len(references)} references")
    samples = _flat(samples, "samples")
    indices = np.zeros((len(samples), k), np.int32)
    distances = np.full((len(samples), k), np.inf, np.float32)
    first, size = 0, k
    for batch in references.batches().batches if len(samples) else ():
        # The last batch is padded, so that nothing recompiles.
        size = max(size, len(batch))
        found = _nearest_in(_flat(batch, "references"), size, samples, batch_size_images, k)
        indices, distances = (
            np.concatenate(both, axis=1)
            for both in ((indices, first + found[0]), (distances, found[1]))
        )
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        indices, distances = (np.take_along_axis(x, order, 1) for x in (indices, distances))
        first += len(batch)
    return indices, distances


def _nearest_in(
    block: np.ndarray, size: int, samples: np.ndarray, batch_size_images: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of one block of references, padded to `size` with infinitely far ones."""
    missing = size - len(block)
    squares = np.pad((block**2).sum(-1), (0, missing), constant_values=np.inf)
    search = partial(_search, jnp.asarray(np.pad(block, [(0, missing), (0, 0)])), squares, k=k)
    rows = min(batch_size_images, len(samples))
    parts = []
    for start in range(0, len(samples), rows):
        some = samples[start : start + rows]
        found = search(np.pad(some, [(0, rows - len(some)), (0, 0)]))
        parts.append([np.asarray(part)[: len(some)] for part in found])
    indices, distances = (np.concatenate(column) for column in zip(*parts, strict=True))
    return indices, distances


class Memorisation(NamedTuple):
    """Whether samples are closer to the training images than fresh real images are.

    Attributes:
        closer_than_test: probability that a random sample is nearer to the training set than a
            random test image is (ties count half). It is 0.5 for a perfect generator. Values near 1
            mean copies, or samples smoother than real images; values near 0 mean samples far from
            real images. It is the Mann-Whitney statistic of Meehan et al. 2020
            (arXiv:2004.05675), scaled to [0, 1], with the whole space as one cell.
        distance_ratio: median distance of samples to the training set, divided by that of test
            images.
        copied: share of samples whose distance to the nearest training image is less than a third
            of that to the second nearest (Yoon et al. 2023): near-copies of one image.
        copied_floor: the same share of real test images.
    """

    closer_than_test: float
    distance_ratio: float
    copied: float
    copied_floor: float


def memorisation(sample_distances: np.ndarray, test_distances: np.ndarray) -> Memorisation:
    """Compares the distances to the training set of samples and of held-out real images.

    Args:
        sample_distances: `[N, 2]`, from `nearest_neighbours(samples, train, k=2)`.
        test_distances: `[M, 2]`, from `nearest_neighbours(test, train, k=2)`.

    Raises:
        UserError: either is empty or does not have two columns.

    Example:
        >>> far, near = np.array([[2.0, 2.1]]), np.array([[0.1, 2.0]])
        >>> memorisation(near, far).closer_than_test, memorisation(near, far).copied
        (1.0, 1.0)
    """
    for distances in (sample_distances, test_distances):
        if distances.ndim != 2 or distances.shape[1] != 2 or not len(distances):
            raise UserError(f"memorisation needs [N, 2] distances, not {list(distances.shape)}")
    samples, test = sample_distances[:, 0], np.sort(test_distances[:, 0])
    farther = len(test) - np.searchsorted(test, samples, side="right")
    tied = np.searchsorted(test, samples, side="right") - np.searchsorted(test, samples)
    # If most test images were in the training set, the ratio would be a division by 0.
    typical = max(float(np.median(test)), float(np.finfo(np.float32).tiny))
    return Memorisation(
        closer_than_test=float((farther + 0.5 * tied).mean() / len(test)),
        distance_ratio=float(np.median(samples)) / typical,
        copied=copied(sample_distances),
        copied_floor=copied(test_distances),
    )


def copied(distances: Float[np.ndarray, " samples 2"]) -> float:
    """Share of near-copies among samples, from their two nearest distances (see `Memorisation`).

    Args:
        distances: `[N, 2]`, from `nearest_neighbours(samples, train, k=2)`.
    """
    # An exact copy of a training image that occurs twice has distances 0 and 0: a copy too.
    first, second = distances[:, 0], distances[:, 1]
    return float(((first < COPY_RATIO * second) | (first == 0.0)).mean())


@partial(jax.jit, static_argnames="k")
def _search(references, squares, batch, *, k):
    """Indices and distances `[B, k]` of the nearest of `references` `[M, F]`."""
    # |x|² is the same for all references, so it does not change who is nearest.
    scores = 2.0 * batch @ references.T - squares[None]
    best, indices = jax.lax.top_k(scores, k)
    gaps = batch[:, None] - references[indices]
    distances = jnp.where(jnp.isfinite(best), jnp.sqrt(jnp.sum(gaps**2, -1)), jnp.inf)
    order = jnp.argsort(distances, axis=-1)
    return jnp.take_along_axis(indices, order, -1), jnp.take_along_axis(distances, order, -1)


def _flat(images: np.ndarray, what: str) -> Float32[np.ndarray, " images numbers"]:
    flat = np.asarray(images, np.float32).reshape(len(images), math.prod(images.shape[1:]))
    bad = int((~np.isfinite(flat)).any(1).sum())
    if bad:
        raise UserError(f"{bad} of {len(flat)} {what} are not finite")
    return flat
