"""The input pipeline: the stream of training batches, and batches for evaluation."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from diffjax.data.augment import UNIFORMS_PER_IMAGE, Augmentation
from diffjax.data.randomness import permutation, uniforms
from diffjax.data.sources import Batch, Bucket, Source
from diffjax.errors import UserError

_END_STEP = 2**62
# Threads that prepare a batch each, and batches that are kept ready.
_READING = (2, 4)
# The second half of a key, larger than all epochs, which are the second halves for permutations.
_AUGMENT_KEY = 2**64 - 1
_DRAW_KEY = 2**64 - 2


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    augment: Augmentation | None = None,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """The endless stream of training batches, starting at any step.

    The stream is a sequence of epochs, each a new permutation of all images. Step k takes the
    images kB … (k+1)B − 1 of the stream, and part p of P is the p-th of P equal parts of
    them. So the global batch of step k depends on the source, the seed, B and k alone: not on P,
    and not on the step at which the stream started. Starting at a late step is as fast as at 0. A
    source smaller than a batch is repeated. Of a source with buckets an epoch is a permutation of
    batches, each of images of one shape; the last batch of a bucket is filled up with its first.

    Args:
        source: the source of the images.
        batch_size: B, the number of images in all processes together.
        seed: the seed of the order and the augmentations, 0 … 2⁶⁴ − 1.
        start_step: the first step to yield.
        augment: an augmentation (`diffjax.data.augment`).
        part: `(p, P)`: part p, from 0, of P, for one of several processes.

    Returns:
        An iterator over `{"image": float32 [B/P,H,W,C] in [-1,1], "label": int32 [B/P]}`; pairs
        also have `"source": float32 [B/P,H,W,C]`, and moments of latents `"log_variance"`.

    Raises:
        UserError: the source is empty, or the numbers do not fit together; a damaged image when it
            is read.

    Example:
        >>> from diffjax.data import digits
        >>> stream = batches(digits().train, batch_size=32, seed=0, start_step=1000)
        >>> next(stream)["image"].shape
        (32, 8, 8, 1)
    """
    # Grain takes half a second to import, and only training needs it.
    import grain

    index, count = part
    _check(len(source), batch_size, seed, start_step, part)
    local_size = batch_size // count

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return permutation((seed, epoch), len(source))

    def batch_at(step: int) -> Batch:
        first = step * batch_size + index * local_size
        chosen = uniforms((seed, _DRAW_KEY), first, (local_size, UNIFORMS_PER_IMAGE))[:, 0]
        if source.buckets:
            rows = rows_of_bucket(source.buckets, step, batch_size, seed)
            rows = rows[index * local_size : (index + 1) * local_size]
        else:
            rows = _rows(first, local_size, len(source), order)
        batch = source.draw(rows, chosen)
        if augment is not None and source.pixels:
            random = uniforms((seed, _AUGMENT_KEY), first, (local_size, UNIFORMS_PER_IMAGE))
            batch = _with_images(batch, augment, random)
        return _as_float(batch)

    steps = grain.MapDataset.range(start_step, _END_STEP)
    return iter(steps.map(batch_at).to_iter_dataset(grain.ReadOptions(*_READING)))


def _check(
    num_images: int, batch_size: int, seed: int, start_step: int, part: tuple[int, int]
) -> None:
    index, count = part
    if not num_images:
        raise UserError("there are no training images")
    if batch_size < 1 or count < 1 or batch_size % count:
        raise UserError(f"batch_size={batch_size} does not divide into {count} parts")
    if not 0 <= index < count:
        raise UserError(f"part={part}: {index} is not one of {count} parts, counted from 0")
    if not 0 <= seed < 2**64:
        raise UserError(f"seed={seed} is not between 0 and 2**64 - 1")
    if not 0 <= start_step < _END_STEP:
        raise UserError(f"start_step={start_step} can't be negative")


def _rows(first: int, size: int, num_images: int, order: Callable[[int], np.ndarray]) -> np.ndarray:
    """The rows of the source at positions `first` … `first + size − 1` of the stream."""
    epochs, places = np.divmod(np.arange(first, first + size), num_images)
    return np.concatenate([order(int(e))[places[epochs == e]] for e in np.unique(epochs)])


def rows_of_bucket(buckets: Sequence[Bucket], step: int, batch_size: int, seed: int) -> np.ndarray:
    """The rows of a step's batch, all of one bucket.

    Example:
        >>> buckets = Bucket(range(0, 3), (2, 4, 1)), Bucket(range(3, 5), (4, 2, 1))
        >>> steps = [rows_of_bucket(buckets, step, 2, seed=0) for step in range(3)]
        >>> sorted(np.concatenate(steps).tolist())  # Three rows make two batches.
        [0, 1, 2, 2, 3, 4]
    """
    batches_of = [-(-len(bucket.rows) // batch_size) for bucket in buckets]
    epoch, place = divmod(step, sum(batches_of))
    # Permutations of batches and of the rows of each bucket have keys of their own.
    key = epoch * (len(buckets) + 1)
    number = int(permutation((seed, key), sum(batches_of))[place])
    chosen = int(np.searchsorted(np.cumsum(batches_of), number, side="right"))
    first = (number - sum(batches_of[:chosen])) * batch_size
    rows = buckets[chosen].rows
    order = permutation((seed, key + 1 + chosen), len(rows))
    return rows.start + order[np.arange(first, first + batch_size) % len(rows)]


def eval_batches(source: Source, *, batch_size: int, limit_images: int = 0) -> Iterator[Batch]:
    """Batches of all images once, in the source's order, without augmentation.

    The last batch may be smaller.

    Args:
        source: the source of the images.
        batch_size: the number of images per batch.
        limit_images: the number of images, evenly spaced, so that a set sorted by class stays
            balanced; all with 0 or with more than there are.

    Yields:
        Batches as `batches` yields them.

    Raises:
        UserError: the source is empty; a damaged image when it is read.

    Example:
        >>> from diffjax.data import digits
        >>> [len(b["label"]) for b in eval_batches(digits().test, batch_size=200)]
        [200, 159]
    """
    if not len(source):
        raise UserError(
            "there are no images to evaluate on: data.test_fraction=0 leaves no test images"
        )
    rows = _evenly(source, limit_images)
    for start in range(0, len(rows), batch_size):
        yield batch_at(source, rows[start : start + batch_size])


def _evenly(source: Source, limit_images: int) -> np.ndarray:
    num_images = min(limit_images or len(source), len(source))
    return np.arange(num_images) * len(source) // max(num_images, 1)


def batch_at(source: Source, rows: np.ndarray) -> Batch:
    """The batch of the images at `rows`, in that order, with the types of `batches`."""
    return _as_float(source.gather(rows))


def all_images(source: Source, limit_images: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of a source: float32 `[N,H,W,C]` in [-1,1] and int32 `[N]`.

    Args:
        source: the source of the images.
        limit_images: the number of images, as in `eval_batches`.

    Raises:
        UserError: the source is empty, or an image is damaged.
    """
    batch = all_examples(source, limit_images)
    return batch["image"], batch["label"]


def all_captions(source: Source, limit_images: int = 0) -> list[str]:
    """The captions of the images of `all_images`, in their order; [] where there are none.

    Args:
        source: the source of the images.
        limit_images: the number of images, as in `eval_batches`.
    """
    if not source.captions:
        return []
    return [str(source.captions[int(row)]) for row in _evenly(source, limit_images)]


def all_examples(source: Source, limit_images: int = 0) -> Batch:
    """All examples of a source as one batch; arguments and errors as in `all_images`."""
    parts: Any = list(eval_batches(source, batch_size=1024, limit_images=limit_images))
    whole: Any = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return whole


def _as_float(batch: Batch) -> Batch:
    """The batch with uint8 images scaled to [-1, 1]; float images are not changed."""
    return _with_images(batch, lambda x: to_float(x) if x.dtype == np.uint8 else x)


def _with_images(batch: Batch, change: Callable[..., np.ndarray], *arguments: Any) -> Batch:
    """The batch with changed images; sources and other images are changed in the same way."""
    whole: Any = batch
    changed: Any = {
        name: change(rows, *arguments) if rows.ndim == 4 else rows for name, rows in whole.items()
    }
    return changed


def to_float(images: np.ndarray) -> np.ndarray:
    """Converts uint8 to float32 in [-1, 1]: `x / 127.5 − 1`.

    Example:
        >>> to_float(np.array([0, 255], np.uint8)).tolist()
        [-1.0, 1.0]
    """
    scaled = np.divide(images, np.float32(127.5), dtype=np.float32)
    return np.subtract(scaled, np.float32(1), out=scaled)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Converts floats in [-1, 1] to uint8: `round(127.5 (x + 1))`, clipped; inverts `to_float`.

    Args:
        images: finite floats of any shape.

    Example:
        >>> to_uint8(np.array([-1.0, 0.999, 7.0])).tolist()
        [0, 255, 255]
    """
    scaled = (np.asarray(images, np.float32) + 1) * np.float32(127.5)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
