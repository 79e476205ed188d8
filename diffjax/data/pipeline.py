"""From sources to batches: the training stream, and whole sets for evaluation."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from diffjax.data.augment import UNIFORMS_PER_IMAGE, Augmentation
from diffjax.data.randomness import permutation, uniforms
from diffjax.data.sources import Batch, Source
from diffjax.errors import UserError

_END_STEP = 2**62
# The second half of a key; epochs, which order the images, never get there.
_AUGMENT_KEY = 2**64 - 1


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    augment: Augmentation | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    prefetch_batches: int = 4,
) -> Iterator[Batch]:
    """The endless training stream, from any step on.

    The stream is one epoch after the other, each a new permutation of all images; step k takes its
    images kB … (k+1)B − 1, and process p of P the p-th of P equal parts of them. So the global
    batch of step k depends on the source, the seed, B and k only: not on P, not on where the
    stream was started, and starting late costs nothing. A source smaller than a batch repeats.

    Args:
        source: where the images come from.
        batch_size: B, images over all processes.
        seed: which order and which augmentations, 0 … 2⁶⁴ − 1.
        start_step: the first step to yield.
        augment: see `diffjax.data.augment`.
        process_index: p, from 0.
        process_count: P.
        num_threads: how many batches are worked on at a time, each by one thread; more pay where
            images are decoded from files. 0 works in the caller's thread.
        prefetch_batches: how many batches are kept ready; threads beyond them are not started.

    Returns:
        An iterator over `{"image": float32 [B/P,H,W,C] in [-1,1], "label": int32 [B/P]}`, in a set
        of pairs with `"source": float32 [B/P,H,W,C]`.

    Raises:
        UserError: an empty source, or numbers that don't fit; a damaged image when it is reached.

    Example:
        >>> from diffjax.data import digits
        >>> stream = batches(digits().train, batch_size=32, seed=0, start_step=1000)
        >>> next(stream)["image"].shape
        (32, 8, 8, 1)
    """
    # Grain takes half a second to import, and only training needs it.
    import grain

    _check(len(source), batch_size, seed, start_step, process_index, process_count)
    local_size = batch_size // process_count

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return permutation((seed, epoch), len(source))

    def batch_at(step: int) -> Batch:
        first = step * batch_size + process_index * local_size
        batch = source.gather(_rows(first, local_size, len(source), order))
        if augment is not None:
            random = uniforms((seed, _AUGMENT_KEY), first, (local_size, UNIFORMS_PER_IMAGE))
            batch = _with_images(batch, augment, random)
        return _as_float(batch)

    options = grain.ReadOptions(
        num_threads=min(num_threads, prefetch_batches), prefetch_buffer_size=prefetch_batches
    )
    steps = grain.MapDataset.range(start_step, _END_STEP)
    return iter(steps.map(batch_at).to_iter_dataset(options))


def _check(
    num_images: int, batch_size: int, seed: int, start_step: int, index: int, count: int
) -> None:
    if not num_images:
        raise UserError("there are no training images")
    if batch_size < 1 or count < 1 or batch_size % count:
        raise UserError(f"batch_size={batch_size} does not divide by {count} processes")
    if not 0 <= index < count:
        raise UserError(f"process_index={index} is not one of {count} processes")
    if not 0 <= seed < 2**64:
        raise UserError(f"seed={seed} is not between 0 and 2**64 - 1")
    if not 0 <= start_step < _END_STEP:
        raise UserError(f"start_step={start_step} can't be negative")


def _rows(first: int, size: int, num_images: int, order: Callable[[int], np.ndarray]) -> np.ndarray:
    """Which rows of the source are `first` … `first + size − 1` of the stream."""
    epochs, places = np.divmod(np.arange(first, first + size), num_images)
    return np.concatenate([order(int(e))[places[epochs == e]] for e in np.unique(epochs)])


def eval_batches(source: Source, *, batch_size: int, limit_images: int = 0) -> Iterator[Batch]:
    """Every image once, in the source's order, unchanged; the last batch may be smaller.

    Args:
        source: where the images come from.
        batch_size: images per batch.
        limit_images: take that many, evenly spaced, so that a set sorted by class stays balanced;
            0 or more than there are takes all.

    Yields:
        As `batches`.

    Raises:
        UserError: the source is empty; a damaged image when it is reached.

    Example:
        >>> from diffjax.data import digits
        >>> [len(b["label"]) for b in eval_batches(digits().test, batch_size=200)]
        [200, 159]
    """
    if not len(source):
        raise UserError(
            "there are no images to evaluate on: with data.test_fraction=0 none are for testing"
        )
    num_images = min(limit_images or len(source), len(source))
    rows = np.arange(num_images) * len(source) // num_images
    for start in range(0, num_images, batch_size):
        yield batch_at(source, rows[start : start + batch_size])


def batch_at(source: Source, rows: np.ndarray) -> Batch:
    """The images at these rows, in that order, as `batches` has them."""
    return _as_float(source.gather(rows))


def all_images(source: Source, limit_images: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A whole set in memory: float32 `[N,H,W,C]` in [-1,1] and int32 `[N]`.

    Args:
        source: where the images come from.
        limit_images: as in `eval_batches`.

    Raises:
        UserError: as `eval_batches`.
    """
    parts = list(eval_batches(source, batch_size=1024, limit_images=limit_images))
    return (
        np.concatenate([part["image"] for part in parts]),
        np.concatenate([part["label"] for part in parts]),
    )


def _as_float(batch: Batch) -> Batch:
    """Images of bytes scaled to [-1, 1]; images of floats as they are."""
    return _with_images(batch, lambda x: to_float(x) if x.dtype == np.uint8 else x)


def _with_images(batch: Batch, change: Callable[..., np.ndarray], *arguments: Any) -> Batch:
    """The batch with its images changed, both ends of a pair alike."""
    changed: Batch = {**batch, "image": change(batch["image"], *arguments)}
    if "source" in batch:
        changed["source"] = change(batch["source"], *arguments)
    return changed


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 to float32 in [-1, 1]: `x / 127.5 − 1`.

    Example:
        >>> to_float(np.array([0, 255], np.uint8)).tolist()
        [-1.0, 1.0]
    """
    scaled = np.divide(images, np.float32(127.5), dtype=np.float32)
    return np.subtract(scaled, np.float32(1), out=scaled)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """The inverse of `to_float`, exact on what came from it: `round(127.5 (x + 1))`, clipped.

    Args:
        images: finite floats of any shape.

    Example:
        >>> to_uint8(np.array([-1.0, 0.999, 7.0])).tolist()
        [0, 255, 255]
    """
    scaled = (np.asarray(images, np.float32) + 1) * np.float32(127.5)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
