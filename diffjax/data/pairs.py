"""Data sets of pairs: each image with its `source`, the other end of the path."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.data.archives import read_npz
from diffjax.data.given import GivenSource
from diffjax.data.sources import Batch, DataSet, Example, Source, check_channels_last
from diffjax.errors import UserError
from diffjax.kinds import AtLeastOne


@dataclass(frozen=True, eq=False, repr=False)
class PairSource(Source):
    """A source of pairs in memory: images, their sources and labels.

    uint8 arrays are scaled to [-1, 1] by the input pipeline; float arrays are not scaled.

    Args:
        images: uint8 or float32 `[N,H,W,C]`.
        sources: uint8 or float32, of the same shape: images of another set, or noise.
        labels: int32 `[N]`.

    Raises:
        UserError: another type or shape, channels before the pixels, or numbers that are not
            finite.

    Example:
        >>> images = np.zeros((2, 8, 8, 1), np.float32)
        >>> PairSource(images, images, np.zeros(2, np.int32)).gather([1])["source"].shape
        (1, 8, 8, 1)
    """

    images: np.ndarray
    sources: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        for name, array in (("images", self.images), ("sources", self.sources)):
            if array.dtype not in (np.uint8, np.float32) or array.ndim != 4:
                raise UserError(
                    f"{name} of pairs must be uint8 or float32 [N,H,W,C], "
                    f"not {array.dtype} {array.shape}"
                )
            check_channels_last(array.shape, f"{name} of pairs")
            if not np.isfinite(array).all():
                raise UserError(f"{name} of pairs hold numbers that are not finite")
        if self.sources.shape != self.images.shape:
            raise UserError(
                f"pairs need sources of the images' shape {self.images.shape}, "
                f"not {self.sources.shape}"
            )
        if self.labels.dtype != np.int32 or self.labels.shape != self.images.shape[:1]:
            raise UserError(
                f"labels of {len(self.images)} pairs must be int32 [{len(self.images)}], "
                f"not {self.labels.dtype} {self.labels.shape}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return {
            "image": self.images[index],
            "label": int(self.labels[index]),
            "source": self.sources[index],
        }

    def gather(self, rows: Sequence[int] | np.ndarray) -> Batch:
        return {
            "image": self.images[rows],
            "label": self.labels[rows],
            "source": self.sources[rows],
        }

    def fingerprint(self) -> str:
        """SHA-256 of the types, shapes and values of images, sources and labels."""
        digest = hashlib.sha256()
        for array in (self.images, self.sources, self.labels):
            digest.update(f"{array.dtype} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Coarse:
    """Replaces each block of `factor × factor` pixels by its mean; the image keeps its size.

    Args:
        factor: the side of a block in pixels; it has to divide the image's sides.

    Raises:
        UserError: `factor` does not divide the image.

    Example:
        >>> image = np.array([0, 2, 4, 6], np.uint8).reshape(1, 2, 2, 1)
        >>> Coarse(factor=2)(image).ravel().tolist()
        [3, 3, 3, 3]
    """

    factor: AtLeastOne[int] = 2

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The coarse images, uint8 `[B,H,W,C]`, of images of the same shape."""
        n, height, width, channels = images.shape
        f = self.factor
        if f < 1 or height % f or width % f:
            raise UserError(f"Coarse(factor={f}) does not divide an image of {height}x{width}")
        blocks = images.reshape(n, height // f, f, width // f, f, channels)
        means = np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)
        return means.repeat(f, axis=1).repeat(f, axis=2)


@dataclass(frozen=True, eq=False, repr=False)
class TranslatedSource(Source):
    """A source of pairs: the images of another source, each with a changed copy as its source.

    Args:
        images: the source of the images.
        change: a function of uint8 `[B,H,W,C]` to the same shape; a frozen dataclass, because its
            `repr` enters the fingerprint.
    """

    images: Source
    change: Callable[[np.ndarray], np.ndarray]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        example = self.images[index]
        return {**example, "source": self.change(example["image"][None])[0]}

    def gather(self, rows: Sequence[int] | np.ndarray) -> Batch:
        batch = self.images.gather(rows)
        return {**batch, "source": self.change(batch["image"])}

    def fingerprint(self) -> str:
        """SHA-256 of the images' fingerprint and the `repr` of the change."""
        stated = f"{self.images.fingerprint()} {self.change!r}"
        return hashlib.sha256(stated.encode()).hexdigest()


def translation(dataset: DataSet, change: Callable[[np.ndarray], np.ndarray]) -> DataSet:
    """A data set of pairs from a data set of images: each image with a changed copy as its source.

    A model of the pairs translates changed images back into images.

    Args:
        dataset: the images.
        change: from images to their sources, such as `Coarse()`.

    Raises:
        UserError: the data are latents.

    Example:
        >>> from diffjax.data import digits
        >>> sorted(translation(digits(), Coarse()).test.gather([0]))
        ['image', 'label', 'source']
    """
    if not dataset.codec.pixels:
        raise UserError(f"{change!r} changes pixels, and {dataset.name} are latents")
    return DataSet(
        name=f"{dataset.name} from {change!r}",
        train=TranslatedSource(dataset.train, change),
        test=TranslatedSource(dataset.test, change),
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
        label_names=dataset.label_names,
        notes=dataset.notes,
        given=dataset.given,
    )


def pairs(dataset: DataSet, path: str = "") -> DataSet:
    """A data set whose training pairs come from a file, as reflow needs them.

    Args:
        dataset: the real images: its test split is kept, and its training split becomes `real`,
            with which samples are compared.
        path: an `.npz` file with `image` and `source`, uint8 or float32 `[N,H,W,C]`, and int
            `label` `[N]`, as `python -m experiments.reflow` writes it; with the arrays of the data
            set's condition, if that is not its classes.

    Raises:
        UserError: the file is missing or damaged, or its pairs do not fit the images.
    """
    if not path:
        raise UserError(
            "this config needs pairs: make them by python -m experiments.reflow, and set "
            "--config.data.path=pairs.npz"
        )
    arrays = _read(Path(path))
    label = arrays["label"]
    train = PairSource(arrays["image"], arrays["source"], label.astype(np.int32))
    if train.images.shape[1:] != dataset.image_shape:
        raise UserError(
            f"pairs in {path} have shape {train.images.shape[1:]}, images of {dataset.name} "
            f"{dataset.image_shape}"
        )
    if len(label) and not 0 <= label.min() <= label.max() < max(dataset.num_classes, 1):
        raise UserError(
            f"labels in {path} go from {label.min()} to {label.max()}, but {dataset.name} has "
            f"{dataset.num_classes} classes"
        )
    return DataSet(
        name=f"{dataset.name} pairs",
        train=_with_given(train, dataset, arrays, path),
        test=dataset.test,
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
        label_names=dataset.label_names,
        notes=dataset.notes,
        real=dataset.train,
        given=dataset.given,
        codec=dataset.codec,
    )


def _with_given(train: Source, dataset: DataSet, arrays: dict[str, Any], path: str) -> Source:
    """Pairs with the arrays of a condition that is not classes."""
    if dataset.given is None:
        return train
    names = [name for name in dataset.given.shapes(1) if name != "label"]
    missing = [name for name in names if name not in arrays]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}, and {dataset.name} is conditioned on "
            f"{dataset.given.describe()}"
        )
    return GivenSource(train, {name: arrays[name] for name in names})


def _read(path: Path) -> dict[str, np.ndarray]:
    arrays = read_npz(path, str(path))
    missing = {"image", "source", "label"} - set(arrays)
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}: it is not a file of pairs")
    if not np.issubdtype(arrays["label"].dtype, np.integer) or arrays["label"].ndim != 1:
        raise UserError(f"labels in {path} are not a list of integers")
    return arrays
