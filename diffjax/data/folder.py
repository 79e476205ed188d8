"""Data sets from folders of image files, with labels from the subfolders."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, cast

import numpy as np
from PIL import Image, ImageColor, ImageFile, ImageOps, TiffImagePlugin

from diffjax.data.damaged import passing_over
from diffjax.data.fingerprints import evenly, hash_parts
from diffjax.data.sources import (
    DataSet,
    Example,
    Source,
    SplitSeed,
    TestFraction,
    stratified_split,
)
from diffjax.errors import UserError
from diffjax.host.files import place_of
from diffjax.kinds import AtLeastOne, NotNegative, Range

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Below Pillow's own limit, which only warns; a file of a few kilobytes can decode to gigapixels.
_MAX_PIXELS = 64_000_000
_MODES = {1: "L", 3: "RGB"}
# Pillow chooses a decoder by the content, not by the name, and would start Ghostscript for EPS.
# JPEG includes the files of some cameras (MPO), and PPM includes PGM.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_PNG_DEPTH = 24  # the position of the bit depth in a PNG file, in bytes
_ORIENTATION, _ON_ITS_SIDE = 274, (5, 6, 7, 8)  # the tag of cameras, and values for such pictures
_BITS_PER_SAMPLE = 258  # the tag of the bit depth in a TIFF file

BACKGROUND = "white"


def image_folder(
    path: str = "data/images",
    image_size: AtLeastOne[int] = 64,
    channels: Annotated[int, Range("[1, 3]")] = 3,
    test_fraction: TestFraction = 0.1,
    split_seed: SplitSeed = 0,
    max_damaged: NotNegative[int] = 0,
    background: str = BACKGROUND,
) -> DataSet:
    """A data set from a folder of images of any size, which are read on demand.

    Each subfolder is a class, in alphabetical order, with its images at any depth; links to images
    and to folders are followed. Images directly in the folder, without subfolders, have no labels
    (`num_classes` is 0). Names that start with a dot and files without the suffix of an image are
    ignored.

    Args:
        path: the folder.
        image_size: the side of the images in pixels: the central square is cropped and resized
            (`read_image`).
        channels: 3 for colour, 1 for grey.
        test_fraction: the fraction of images for testing, in each class as near to it as whole
            images allow. With 0 there are no test images, and no metrics that need them.
        split_seed: the seed of the split.
        max_damaged: how many images of each split may be unreadable (`PassingOver`).
        background: the colour behind transparent pixels, by name or as `#rrggbb`.

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
    check_colour(background)
    root = place_of(path)
    files, labels, names = _list_images(root)
    train, test = stratified_split(labels, test_fraction, split_seed)

    def source(rows: np.ndarray) -> Source:
        chosen = tuple(files[row] for row in rows)
        whole = FolderSource(root, chosen, labels[rows], image_size, channels, background)
        return passing_over(whole, max_damaged, str(root))

    shape = (image_size, image_size, channels)
    return DataSet(
        root.resolve().name,
        source(train),
        source(test),
        shape,
        len(names),
        names,
        notes=note_on_size(root, files, image_size),
    )


def _list_images(root: Path) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    """Names relative to `root`, their labels, and the names of the classes."""
    if not root.is_dir():
        raise UserError(f"no folder {root}: set data.path to a folder of images")
    try:
        entries = _entries(root)
        loose = [entry.name for entry in entries if _is_image(entry)]
        classes = {
            entry.name: sorted(
                file.relative_to(root).as_posix()
                for file in _images_below(entry, (root.resolve(),))
            )
            for entry in entries
            if entry.is_dir()
        }
    except OSError as error:
        raise UserError(f"can't read {error.filename or root}: {error.strerror}") from None
    if loose and classes:
        raise UserError(
            f"{root} holds images ({loose[0]} …) and subfolders ({next(iter(classes))} …): "
            "move the images into subfolders, or the subfolders away"
        )
    for name, files in classes.items():
        if not files:
            raise UserError(f"{root / name} holds no images ({' '.join(_SUFFIXES)})")
    if loose:
        return loose, np.zeros(len(loose), np.int32), ()
    if not classes:
        raise UserError(f"{root} holds no images ({' '.join(_SUFFIXES)})")
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(v) for v in classes.values()])
    return [file for files in classes.values() for file in files], labels, tuple(classes)


def images_in(root: Path) -> list[str]:
    """The images in a folder at any depth, relative to it and sorted, whatever its subfolders mean.

    Raises:
        UserError: the folder is missing, unreadable or without images; a link leads nowhere or to a
            folder above it.
    """
    if not root.is_dir():
        raise UserError(f"no folder {root}: set data.path to a folder of images")
    try:
        files = sorted(file.relative_to(root).as_posix() for file in _images_below(root, ()))
    except OSError as error:
        raise UserError(f"can't read {error.filename or root}: {error.strerror}") from None
    if not files:
        raise UserError(f"{root} holds no images ({' '.join(_SUFFIXES)})")
    return files


def note_on_size(root: Path, files: Sequence[str], image_size: int) -> tuple[str, ...]:
    """A note if images have to be enlarged, judged by at most 256 of them."""
    looked_at = [_shorter_side(root / files[int(row)]) for row in evenly(len(files))]
    sides = np.array([side for side in looked_at if side])
    small = int((sides < image_size).sum())
    if not small:
        return ()
    # Nine images of ten are at least that large; a multiple of 8, since networks halve it.
    fitting = int(np.quantile(sides, 0.1, method="lower"))
    fitting = fitting // 8 * 8 or fitting
    advice = f": data.image_size={fitting} suits them" if fitting < image_size else ""
    return (
        f"{small} of {len(sides)} images looked at in {root} have a side below "
        f"data.image_size={image_size}, down to {sides.min()} pixels, and are enlarged{advice}",
    )


def _shorter_side(file: Path) -> int:
    """The shorter side in pixels, without decoding the image; 0 where the file can't be read."""
    return min(size_of(file))


def size_of(file: Path) -> tuple[int, int]:
    """Height and width in pixels, upright, without decoding the image; 0 where it can't be read."""
    try:
        with Image.open(file, formats=_FORMATS) as image:
            turned = image.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE
            width, height = image.size
            return (width, height) if turned else (height, width)
    # As in `read_image`.
    except Exception:
        return 0, 0


def _images_below(folder: Path, above: tuple[Path, ...]) -> list[Path]:
    """The images in a folder at any depth; `above` are the resolved paths of its parent folders.

    Raises:
        UserError: a link to a parent folder, which would repeat its images without end.
    """
    here = folder.resolve()
    if here in above:
        raise UserError(f"{folder} is its own parent folder {here}, by a link: remove the link")
    found = []
    for entry in _entries(folder):
        if entry.is_dir():
            found += _images_below(entry, (*above, here))
        elif _is_image(entry):
            found.append(entry)
    return found


def _entries(folder: Path) -> list[Path]:
    """The entries of a folder that are not hidden, sorted by name.

    Raises:
        UserError: a link without a target: images, or a class, would be missing unnoticed.
    """
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for entry in entries:
        if entry.is_symlink() and not entry.exists():
            raise UserError(f"{entry} is a link to {os.readlink(entry)}, which does not exist")
    return entries


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and path.is_file()


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
    """

    root: Path
    files: tuple[str, ...]
    labels: np.ndarray
    image_size: int | tuple[int, int]
    channels: int
    background: str = BACKGROUND
    captions: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        file = self.root / self.files[index]
        image = read_image(file, str(file), self.image_size, self.channels, self.background)
        return {"image": image, "label": int(self.labels[index])}

    def fingerprint(self) -> str:
        """SHA-256 of the files' names, sizes, labels and captions, and of some of their bytes.

        It also depends on how images are resized. The sample is that of `hash_parts`.
        """
        settings = f"{self.image_size} {self.channels} {self.background}\n"
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

    Returns:
        uint8 `[H,W,C]`.

    Raises:
        UserError: the format is not supported, or the image is damaged, has more than 64 million
            pixels, or more than 8 bits per channel.
    """
    try:
        with Image.open(file, formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise UserError(
                    f"{where} is {image.width}×{image.height} pixels: over {_MAX_PIXELS} in all"
                )
            if image.mode.startswith(("I", "F")) or _colour_bits(image) > 8:
                raise UserError(f"{where} has more than 8 bits per channel: convert it to 8 first")
            upright = ImageOps.exif_transpose(image)
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


def _over(background: str, image: Image.Image) -> Image.Image:
    """The image over the background, without transparency.

    Dropping the alpha channel instead would show hidden pixels that an editor left below it.
    """
    if not image.has_transparency_data:
        return image
    front = image.convert("RGBA")
    back = Image.new("RGBA", front.size, ImageColor.getrgb(background)[:3])
    return Image.alpha_composite(back, front)


def _colour_bits(image: ImageFile.ImageFile) -> int:
    """Bits per channel as stored in the file; Pillow reduces deeper colours to 8 silently."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    if image.format == "PNG":
        stream = cast(BinaryIO, image.fp)
        here = stream.tell()
        stream.seek(_PNG_DEPTH)
        depth = stream.read(1)[0]
        stream.seek(here)
        return depth
    if image.format == "PPM" and isinstance(args := image.tile[0].args, tuple):
        _, *most = args
        return max([1, *most]).bit_length()
    return 8


def _fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    # The larger side is cropped, rounded, so that a square is cropped to a square.
    high = min(image.height, round(image.width * height / width))
    wide = min(image.width, round(image.height * width / height))
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    image = image.crop((left, top, left + wide, top + high))
    filter_ = Image.Resampling.BOX if wide > width else Image.Resampling.BICUBIC
    same = image.size == (width, height)
    return image if same else image.resize((width, height), filter_)
