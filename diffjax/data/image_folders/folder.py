"""Data sets from folders of image files, with labels from the subfolders."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np
from PIL import Image, ImageColor, ImageOps

from diffjax.data.fingerprints import evenly, hash_parts
from diffjax.data.image_folders.buckets import BucketedSource, bucket_of, bucket_sizes
from diffjax.data.image_folders.damaged import passing_over
from diffjax.data.image_folders.headers import FORMATS, Headers, bits_of, size_of
from diffjax.data.image_folders.listing import LABEL, Listing, list_images
from diffjax.data.sources import (
    DataSet,
    Example,
    Source,
    SplitSeed,
    TestFraction,
    stratified_split,
)
from diffjax.errors import UserError, nearest
from diffjax.host.files import place_of
from diffjax.kinds import AtLeastOne, NotNegative, Range

# Below Pillow's own limit, which only warns; a file of a few kilobytes can decode to gigapixels.
_MAX_PIXELS = 64_000_000
_MODES = {1: "L", 3: "RGB"}
_LISTED = 6  # classes of a summary
REFUSED, SCALED = "refused", "scaled"
BACKGROUND = "white"


def image_folder(
    path: str = "data/images",
    image_size: AtLeastOne[int] = 64,
    channels: Annotated[int, Range("[1, 3]")] = 3,
    test_fraction: TestFraction = 0.1,
    split_seed: SplitSeed = 0,
    max_damaged: NotNegative[int] = 0,
    background: str = BACKGROUND,
    labels: str = "",
    label_column: str = LABEL,
    buckets: NotNegative[int] = 0,
    sixteen_bits: str = REFUSED,
) -> DataSet:
    """A data set from a folder of images of any size, which are read on demand.

    Each subfolder is a class, in alphabetical order, with its images at any depth; links to images
    and to folders are followed. Images directly in the folder, without subfolders, have no labels
    (`num_classes` is 0), unless a table has them. Where the subfolders are `train` and `val`, they
    are the split, and each is such a folder (`diffjax.data.image_folders.listing`). Names that
    start with a dot and files without the suffix of an image are ignored.

    Args:
        path: the folder.
        image_size: the side of the images in pixels: the central square is cropped and resized
            (`read_image`).
        channels: 3 for colour, 1 for grey.
        test_fraction: the fraction of images for testing, in each class as near to it as whole
            images allow, where the folder has no folders `train` and `val`. With 0 there are no
            test images, and no metrics that need them.
        split_seed: the seed of the split.
        max_damaged: how many images of each split may be unreadable (`PassingOver`).
        background: the colour behind transparent pixels, by name or as `#rrggbb`.
        labels: a CSV or JSON-lines file of labels; "" takes `metadata.csv`, `metadata.jsonl` or
            `labels.csv` in the folder, if it has the column, and subfolders otherwise.
        label_column: the column of labels; that of images is `file_name`, or the first.
        buckets: the step of sizes of buckets in pixels: training images keep their aspect ratio as
            nearly as a bucket has it, and each batch is of one; 0 for squares alone. Test images
            and what samples are compared with are squares.
        sixteen_bits: whether images with more than 8 bits per channel are "refused", or "scaled" so
            that the largest number of 16 bits is 255.

    Raises:
        UserError: the folder is missing, unreadable, empty or ambiguous; a link has no target or
            leads to a folder above it; the size or the colour is impossible; when it is read, a
            damaged image, beyond `max_damaged` of them.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as path:
        ...     for name in ("cat", "dog"):
        ...         (Path(path) / name).mkdir()
        ...         for i in range(5):
        ...             Image.new("RGB", (40, 30)).save(Path(path) / name / f"{i}.png")
        ...     data = image_folder(path, image_size=16)
        ...     data.label_names, len(data.train), data.train[0]["image"].shape
        (('cat', 'dog'), 9, (16, 16, 3))
    """
    if image_size < 1 or channels not in _MODES:
        raise UserError(
            f"image_size must be at least 1 and channels 1 or 3, not {image_size} and {channels}"
        )
    if sixteen_bits not in (REFUSED, SCALED):
        raise UserError(
            f"data.sixteen_bits={sixteen_bits!r}: {nearest(sixteen_bits, (REFUSED, SCALED))}"
        )
    check_colour(background)
    sizes = bucket_sizes(image_size, buckets) if buckets else []
    root = place_of(path)
    listing = list_images(root, labels, label_column)
    train, test = _split(listing, test_fraction, split_seed)
    headers = Headers.of(root, listing.files)

    def source(rows: np.ndarray, size: int | tuple[int, int] = image_size) -> Source:
        chosen = tuple(listing.files[row] for row in rows)
        whole = FolderSource(
            root, chosen, listing.labels[rows], size, channels, background, (), sixteen_bits
        )
        return passing_over(whole, max_damaged, str(root))

    squares = source(train)
    bucketed = squares
    if sizes:
        which = np.array([bucket_of(size_of(root / listing.files[row]), sizes) for row in train])
        numbers = np.unique(which).tolist()
        bucketed = BucketedSource(
            tuple(source(train[which == number], sizes[number]) for number in numbers),
            tuple((*sizes[number], channels) for number in numbers),
        )
    return DataSet(
        root.resolve().name,
        bucketed,
        source(test),
        (image_size, image_size, channels),
        len(listing.names),
        listing.names,
        real=squares if sizes else None,
        notes=note_on_size(root, headers, image_size),
        facts={
            **headers.facts(image_size, background, buckets),
            **_facts(listing, train, test, test_fraction),
        },
    )


def _split(listing: Listing, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows for training and for testing."""
    if not listing.num_train:
        return stratified_split(listing.labels, fraction, seed)
    first, others = np.split(np.arange(len(listing.files)), [listing.num_train])
    return first, others


def _facts(
    listing: Listing, train: np.ndarray, test: np.ndarray, fraction: float
) -> dict[str, str]:
    """Where labels and test images are from, in words."""
    counts = np.bincount(listing.labels[train], minlength=len(listing.names))
    of_each = [f"{name} {count:,}" for name, count in zip(listing.names, counts, strict=False)]
    more = f" and {len(of_each) - _LISTED} more" if len(of_each) > _LISTED else ""
    classes = f"from {listing.labels_from}: {', '.join(of_each[:_LISTED])}{more}"
    held_out = (
        f"{len(test):,} in the folder {listing.held_out}"
        if listing.held_out
        else f"{len(test):,} drawn (test_fraction={fraction:g})"
    )
    passed_over = f" ({listing.passed_over})" if listing.passed_over else ""
    return {"classes": (classes if of_each else "none") + passed_over, "testing": held_out}


def note_on_size(root: Path, headers: Headers, image_size: int) -> tuple[str, ...]:
    """A note if images have to be enlarged, judged by some of them."""
    small = int((headers.shorter < image_size).sum()) if len(headers.sides) else 0
    if not small:
        return ()
    # A multiple of 8, since networks halve it.
    fitting = headers.usual_side // 8 * 8 or headers.usual_side
    advice = f": data.image_size={fitting} suits them" if fitting < image_size else ""
    return (
        f"{small} of {len(headers.sides)} images looked at in {root} have a side below "
        f"data.image_size={image_size}, down to {headers.shorter.min()} pixels, and are "
        f"enlarged{advice}",
    )


@dataclass(frozen=True, eq=False, repr=False)
class FolderSource(Source):
    """A source of image files of any size, cropped and resized to one.

    Args:
        root: the folder.
        files: paths relative to `root`.
        labels: int32 `[N]`.
        image_size: the side of the resized images in pixels, or height and width.
        channels: 1 or 3.
        background: the colour behind transparent pixels.
        captions: a text for each image, or none.
        sixteen_bits: as in `image_folder`.
    """

    root: Path
    files: tuple[str, ...]
    labels: np.ndarray
    image_size: int | tuple[int, int]
    channels: int
    background: str = BACKGROUND
    captions: tuple[str, ...] = ()
    sixteen_bits: str = REFUSED

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        file = self.root / self.files[index]
        how = self.image_size, self.channels, self.background, self.sixteen_bits
        image = read_image(file, str(file), *how)
        return {"image": image, "label": int(self.labels[index])}

    def fingerprint(self) -> str:
        """SHA-256 of the files' names, sizes, labels and captions, and of some of their bytes.

        It also depends on how images are resized. The sample is that of `hash_parts`.
        """
        scaled = f" {SCALED}" if self.sixteen_bits == SCALED else ""
        settings = f"{self.image_size} {self.channels} {self.background}{scaled}\n"
        digest = hashlib.sha256(settings.encode())
        for name, label in zip(self.files, self.labels, strict=True):
            file = self.root / name
            try:
                line = f"{name}\t{file.stat().st_size}\t{label}\n"
            except OSError as error:
                raise UserError(f"can't read {file}: {error.strerror}") from None
            digest.update(line.encode(errors="surrogateescape"))
        for caption in self.captions:
            digest.update(f"{caption}\n".encode())
        hash_parts(digest, [self.root / self.files[row] for row in evenly(len(self.files))])
        return digest.hexdigest()


def check_colour(colour: str) -> None:
    """Checks that a text is the name or the code of a colour.

    Raises:
        UserError: Pillow does not know the colour.
    """
    try:
        ImageColor.getrgb(str(colour))
    except ValueError:
        raise UserError(
            f"background={colour!r} is not a colour: use a name, such as 'white', or '#ffffff'"
        ) from None


def read_image(
    file: Path | BinaryIO,
    where: str,
    image_size: int | tuple[int, int] = 0,
    channels: int = 3,
    background: str = BACKGROUND,
    sixteen_bits: str = REFUSED,
) -> np.ndarray:
    """Decodes an image, crops its centre to the wanted aspect ratio and resizes it.

    Images are reduced by area averaging (Pillow's box filter) and enlarged by bicubic
    interpolation. The orientation tag of cameras is applied, and the first frame of an animation is
    used. Where the image has opacity `α` (by an alpha channel, palette or key colour), each channel
    is `α·image + (1 − α)·background`.

    Args:
        file: a path or an open file.
        where: the name of the file in errors.
        image_size: the side of a square in pixels, or height and width; 0 keeps the image as it is.
        channels: 3 for colour, 1 for grey.
        background: a colour by name or as `#rrggbb`.
        sixteen_bits: "refused", or "scaled" by 255/65535: grey is rounded, and colours are as
            Pillow reduces them, within one of 255.

    Returns:
        uint8 `[H,W,C]`.

    Raises:
        UserError: the format is not supported, or the image is damaged, has more than 64 million
            pixels, or more than 8 bits per channel.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise UserError(
                    f"{where} is {image.width}×{image.height} pixels: over {_MAX_PIXELS} in all"
                )
            bits = bits_of(image)
            if image.mode.startswith(("I", "F")) or bits > 8:
                if sixteen_bits != SCALED:
                    raise UserError(
                        f"{where} has more than 8 bits per channel: convert it to 8 first"
                    )
                if image.mode.startswith("F") or bits > 16:
                    raise UserError(f"{where} has more than 16 bits per channel: convert it first")
            upright = _eight_bits(ImageOps.exif_transpose(image))
            image = _over(background, upright).convert(_MODES[channels])
    except UserError:
        raise
    # Pillow's decoders raise almost any exception on damaged files.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"can't read image {where}: {reason}") from None
    if image_size:
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        image = _fitted(image, *sides)
    return np.asarray(image).reshape(image.height, image.width, channels)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey numbers of 16 bits as 8, rounded; Pillow would clip them at 255."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray(np.rint(np.asarray(image, np.float64) / 257).astype(np.uint8), "L")


def _over(background: str, image: Image.Image) -> Image.Image:
    """The image over the background, without transparency.

    Dropping the alpha channel instead would show hidden pixels that an editor left below it.
    """
    if not image.has_transparency_data:
        return image
    front = image.convert("RGBA")
    back = Image.new("RGBA", front.size, ImageColor.getrgb(background)[:3])
    return Image.alpha_composite(back, front)


def _fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    # The larger side is cropped, rounded, so that a square is cropped to a square.
    high = min(image.height, round(image.width * height / width))
    wide = min(image.width, round(image.height * width / height))
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    image = image.crop((left, top, left + wide, top + high))
    filter_ = Image.Resampling.BOX if wide > width else Image.Resampling.BICUBIC
    same = image.size == (width, height)
    return image if same else image.resize((width, height), filter_)
