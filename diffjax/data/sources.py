"""Sources and data sets: images and labels by index, for training and for testing."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple, NotRequired, Protocol, TypedDict

import numpy as np

from diffjax.codecs import Codec, Identity
from diffjax.conditions import Condition, of_classes
from diffjax.data.randomness import permutation
from diffjax.errors import UserError
from diffjax.kinds import Range
from diffjax.oracle.analytic import GaussianMixture

_TIES_KEY = 2**64 - 1  # of which classes have the odd test images; no label gets there
TestFraction = Annotated[float, Range("[0, 1)")]
"""Share of all images that is kept for testing."""
SplitSeed = Annotated[int, Range("[0, 18446744073709551616)")]
"""Of the 64 bits that a permutation takes."""


class Example(TypedDict):
    """One image, uint8 `[H,W,C]`, its label, and for pairs the image's source."""

    image: np.ndarray
    label: int
    source: NotRequired[np.ndarray]


class Batch(TypedDict):
    """Images `[B,H,W,C]`, labels, int32 `[B]`, and for pairs the sources `[B,H,W,C]`."""

    image: np.ndarray
    label: np.ndarray
    source: NotRequired[np.ndarray]


class Bucket(NamedTuple):
    """The rows of a source whose images have one shape.

    Attributes:
        rows: the rows.
        image_shape: the shape `(H, W, C)` of their images.
    """

    rows: range
    image_shape: tuple[int, int, int]


class Source(Protocol):
    """Images and labels by index, in a fixed order; inherit from it, as in the example.

    Example:
        >>> class Black(Source):
        ...     def __len__(self):
        ...         return 10
        ...     def __getitem__(self, index):
        ...         return {"image": np.zeros((8, 8, 1), np.uint8), "label": 0}
        ...     def fingerprint(self):
        ...         return "black"
        >>> Black().gather([0, 3])["image"].shape
        (2, 8, 8, 1)
    """

    pixels: ClassVar[bool] = True
    """Whether images are pixels, which augmentation may change; False for latents."""
    captions: Sequence[str] = ()
    """A text for each image; empty where there are none."""
    buckets: Sequence["Bucket"] = ()
    """Rows of images of one shape, of which a training batch is; empty where all have one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self):,} images)"

    def fingerprint(self) -> str:
        """A hash that changes when the data change."""
        ...

    def gather(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The batch of the images, labels and, for pairs, sources at `rows`, in that order."""
        examples = [self[int(row)] for row in rows]
        batch: Batch = {
            "image": np.stack([example["image"] for example in examples]),
            "label": np.array([example["label"] for example in examples], np.int32),
        }
        sources = [example["source"] for example in examples if "source" in example]
        return {**batch, "source": np.stack(sources)} if sources else batch

    def draw(self, rows: Sequence[int] | np.ndarray, uniforms: np.ndarray) -> Batch:
        """The batch for training; where a source has several versions of an image, one of them.

        Args:
            rows: as in `gather`, which is the default.
            uniforms: a random number in [0, 1) for each row.
        """
        del uniforms
        return self.gather(rows)


@dataclass(frozen=True, eq=False, repr=False)
class ArraySource(Source):
    """A source of images in memory.

    Args:
        images: uint8 `[N,H,W,C]`.
        labels: int32 `[N]`.

    Raises:
        UserError: the arrays have another type or shape, or channels before the pixels.

    Example:
        >>> source = ArraySource(np.zeros((5, 8, 8, 1), np.uint8), np.arange(5, dtype=np.int32))
        >>> len(source), source[3]["label"]
        (5, 3)
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise UserError(
                f"images must be uint8 [N,H,W,C], not {self.images.dtype} {self.images.shape}"
            )
        check_channels_last(self.images.shape, "images")
        if self.labels.dtype != np.int32 or self.labels.shape != self.images.shape[:1]:
            raise UserError(
                f"labels of {len(self.images)} images must be int32 [{len(self.images)}], "
                f"not {self.labels.dtype} {self.labels.shape}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def gather(self, rows: Sequence[int] | np.ndarray) -> Batch:
        return {"image": self.images[rows], "label": self.labels[rows]}

    def fingerprint(self) -> str:
        """SHA-256 of the shape, the pixels and the labels."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels, "<i4").data)
        return digest.hexdigest()


@dataclass(frozen=True)
class DataSet:
    """A training and a test set of images of one shape.

    Args:
        name: the name in reports.
        train: the images to train on.
        test: the images for evaluation; no image is in both.
        image_shape: (height, width, channels) of what a model is trained on: images or latents.
        num_classes: labels are 0 … num_classes − 1; 0 means that the images have no labels.
        label_names: one name per class.
        real: the real training images, if `train` has generated ones.
        notes: remarks on the data, which are printed before training.
        facts: what is known of the data and what becomes of it, for the summary of a dry run.
        codec: what decodes them to pictures; `Identity` for images.
        mixture: the exact distribution of the real images, if it is known.
        given: the kind of condition of the images; by default their classes.
    """

    name: str
    train: Source
    test: Source
    image_shape: tuple[int, int, int]
    num_classes: int
    label_names: tuple[str, ...]
    real: Source | None = None
    notes: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict, repr=False)
    codec: Codec = Identity()
    mixture: GaussianMixture | None = field(default=None, repr=False)
    given: Condition | None = field(default=None, repr=False)

    @property
    def condition(self) -> Condition:
        """The kind of condition that the images have."""
        return self.given or of_classes(self.num_classes, self.label_names)

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of decoded images.

        Raises:
            UserError: these are no latents of the codec.
        """
        return self.codec.image_shape(self.image_shape)

    @property
    def reference(self) -> Source:
        """The training images that samples are compared with."""
        return self.train if self.real is None else self.real

    def describe(self) -> dict:
        """A description to store with results, as plain JSON; `sha256` are the fingerprints."""
        return {
            "name": self.name,
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
            "train_images": len(self.train),
            "test_images": len(self.test),
            "train_sha256": self.train.fingerprint(),
            "test_sha256": self.test.fingerprint(),
        }


def check_channels_last(shape: Sequence[int], what: str) -> None:
    """Refuses arrays that look like `[N, C, H, W]` instead of `[N, H, W, C]`.

    An array looks so if its last two axes are equal and the one before is not, because no picture
    has as many channels as columns; or if the second axis is at most half as long as each of them.

    Args:
        shape: the shape of the array.
        what: the name of the array in errors.

    Raises:
        UserError: the array looks like `[N, C, H, W]`; the message has the transpose.

    Example:
        >>> check_channels_last((100, 32, 32, 4), "latents")
    """
    _, height, width, channels = shape
    unlike_a_picture = width == channels != height or 2 * height <= min(width, channels)
    # Up to four channels are plausible for small pictures in colour, or small latents.
    if channels > 4 and unlike_a_picture:
        raise UserError(
            f"{what} of shape {list(shape)} look like [N,C,H,W], with {height} channels first, "
            "and should be [N,H,W,C]: save their .transpose(0, 2, 3, 1)"
        )


def stratified_split(
    labels: np.ndarray, test_fraction: float, split_seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows into training and test rows, with nearly the same fraction of each class.

    Of N images, `round(f N)` and at least one are for testing. A class of n images has `⌊f n⌋` test
    images, and one more if its remainder `f n − ⌊f n⌋` is among the largest; the seed decides
    between equal remainders. At least one image of each class stays for training.

    Args:
        labels: int `[N]`.
        test_fraction: f, at least 0 and below 1; 0 keeps all images for training.
        split_seed: the seed of the split.

    Returns:
        The rows for training and those for testing, each in increasing order.

    Raises:
        UserError: the fraction is out of range, or no class can spare a test image.

    Example:
        >>> train, test = stratified_split(np.repeat(np.arange(10), 3), 0.1, split_seed=0)
        >>> len(train), len(test)
        (27, 3)

    References:
        The method of largest remainders, of Hamilton (1792).
    """
    if not 0 <= test_fraction < 1:
        raise UserError(
            f"test_fraction must be at least 0 and below 1, not {test_fraction}; "
            "at 0 there are no test images"
        )
    if not 0 <= split_seed < 2**64:
        raise UserError(f"split_seed={split_seed} is not between 0 and 2**64 - 1")
    is_test = np.zeros(len(labels), bool)
    if test_fraction:
        classes, sizes = np.unique(labels, return_counts=True)
        for label, num_test in zip(
            classes, _numbers_for_testing(sizes, test_fraction, split_seed), strict=True
        ):
            rows = np.flatnonzero(labels == label)
            is_test[rows[permutation((split_seed, int(label)), len(rows))[:num_test]]] = True
        if not is_test.any():
            raise UserError(
                f"{len(labels)} images with a class each leave none to test on: test_fraction=0 "
                "trains on all"
            )
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def _numbers_for_testing(sizes: np.ndarray, test_fraction: float, split_seed: int) -> np.ndarray:
    """The number of test images of each class, by largest remainders; one is left for training."""
    shares = test_fraction * sizes
    most = np.maximum(sizes - 1, 0)
    found = np.minimum(np.floor(shares).astype(int), most)
    wanted = max(round(test_fraction * int(sizes.sum())), 1)
    # Rounded, because 0.1·3 and 0.1·13 have the same remainder up to rounding.
    remainders = np.round(shares - np.floor(shares), 9)
    by_chance = permutation((split_seed, _TIES_KEY), len(sizes))
    for place in by_chance[np.argsort(-remainders[by_chance], kind="stable")]:
        if found.sum() < wanted and found[place] < most[place]:
            found[place] += 1
    return found


def digits(test_fraction: TestFraction = 0.2, split_seed: SplitSeed = 0) -> DataSet:
    """scikit-learn's digits: 1,797 handwritten digits of 8×8 grey pixels, 10 classes.

    The values v of 0 … 16 become `round(255 v / 16)`.

    Args:
        test_fraction: the fraction of each digit's images for testing; 0 for none.
        split_seed: the seed of the split.

    Raises:
        UserError: `test_fraction` is outside [0, 1).

    Example:
        >>> data = digits()
        >>> data.image_shape, len(data.train), len(data.test)
        ((8, 8, 1), 1438, 359)

    References:
        Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    # scikit-learn takes a second to import, and most runs use other data.
    from sklearn.datasets import load_digits

    loaded: Any = load_digits()
    images = np.rint(loaded.images * 255 / 16).astype(np.uint8)[..., None]
    labels = loaded.target.astype(np.int32)
    train, test = stratified_split(labels, test_fraction, split_seed)
    return DataSet(
        name="digits",
        train=ArraySource(images[train], labels[train]),
        test=ArraySource(images[test], labels[test]),
        image_shape=(8, 8, 1),
        num_classes=10,
        label_names=tuple("0123456789"),
    )
