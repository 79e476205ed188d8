"""A folder of image files, with labels from its subfolders."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from diffjax.data.damaged import passing_over
from diffjax.data.fingerprints import evenly, hash_parts
from diffjax.data.sources import DataSet, Example, Source, stratified_split
from diffjax.errors import UserError

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Below Pillow's own limit, which only warns; a file of a few kilobytes can claim gigapixels.
_MAX_PIXELS = 64_000_000
_MODES = {1: "L", 3: "RGB"}
# Pillow goes by the content, not by the name, and would start Ghostscript on what says it is EPS.
# JPEG is that of cameras too (MPO), and PPM is PGM.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def image_folder(
    path: str = "data/images",
    image_size: int = 64,
    channels: int = 3,
    test_fraction: float = 0.1,
    split_seed: int = 0,
    max_damaged: int = 0,
) -> DataSet:
    """Images of any size in a folder, read when they are asked for.

    Each subfolder is a class, in alphabetical order, and holds its images at any depth. Images
    directly in the folder, without subfolders, have no labels (`num_classes` 0). Names that start
    with a dot and files that are no images by their suffix are ignored.

    Args:
        path: the folder.
        image_size: side in pixels after the central square was cut out and resized (`read_image`).
        channels: 3 for colour, 1 for grey.
        test_fraction: share of each class kept for testing.
        split_seed: which split.
        max_damaged: images of each split that may be unreadable (`PassingOver`); 0: none.

    Raises:
        UserError: a missing, unreadable, empty or ambiguous folder, or an impossible size; a
            damaged image when it is read, or one more than `max_damaged`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as path:
        ...     for name in ("cat", "dog"):
        ...         (Path(path) / name).mkdir()
        ...         for i in range(5):
        ...             Image.new("RGB", (40, 30)).save(Path(path) / name / f"{i}.png")
        ...     data = image_folder(path, image_size=16)
        ...     data.label_names, len(data.train), data.train[0]["image"].shape
        (('cat', 'dog'), 8, (16, 16, 3))
    """
    if image_size < 1 or channels not in _MODES:
        raise UserError(
            f"image_size must be at least 1 and channels 1 or 3, not {image_size} and {channels}"
        )
    root = Path(path).expanduser()
    files, labels, names = _list_images(root)
    train, test = stratified_split(labels, test_fraction, split_seed)

    def source(rows: np.ndarray) -> Source:
        chosen = tuple(files[row] for row in rows)
        whole = FolderSource(root, chosen, labels[rows], image_size, channels)
        return passing_over(whole, max_damaged, str(root))

    shape = (image_size, image_size, channels)
    return DataSet(root.resolve().name, source(train), source(test), shape, len(names), names)


def _list_images(root: Path) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    """Names relative to `root`, their labels, and the names of the classes."""
    if not root.is_dir():
        raise UserError(f"no folder {root}: set data.path to a folder of images")
    try:
        entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
        loose = [entry.name for entry in entries if _is_image(entry)]
        classes = {
            entry.name: sorted(file.relative_to(root).as_posix() for file in _images_below(entry))
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


def _images_below(folder: Path) -> list[Path]:
    found = []
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            found += _images_below(entry)
        elif _is_image(entry):
            found.append(entry)
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and path.is_file()


@dataclass(frozen=True, eq=False, repr=False)
class FolderSource(Source):
    """Image files of any size.

    Args:
        root: the folder.
        files: their names below `root`.
        labels: int32 `[N]`.
        image_size: side of what comes out, pixels.
        channels: 1 or 3.
    """

    root: Path
    files: tuple[str, ...]
    labels: np.ndarray
    image_size: int
    channels: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        file = self.root / self.files[index]
        image = read_image(file, str(file), self.image_size, self.channels)
        return {"image": image, "label": int(self.labels[index])}

    def fingerprint(self) -> str:
        """SHA-256 of names, sizes in bytes and labels of the files, how they are resized, and of a
        sample of their bytes (`hash_parts`).
        """
        digest = self._listed()
        hash_parts(digest, [self.root / self.files[row] for row in evenly(len(self.files))])
        return digest.hexdigest()

    def earlier_fingerprint(self) -> str:
        """The fingerprint of versions that looked into no file."""
        return self._listed().hexdigest()

    def _listed(self) -> Any:
        digest = hashlib.sha256(f"{self.image_size} {self.channels}\n".encode())
        for name, label in zip(self.files, self.labels, strict=True):
            file = self.root / name
            try:
                line = f"{name}\t{file.stat().st_size}\t{label}\n"
            except OSError as error:
                raise UserError(f"can't read {file}: {error.strerror}") from None
            digest.update(line.encode(errors="surrogateescape"))
        return digest


def read_image(
    file: Path | BinaryIO, where: str, image_size: int = 0, channels: int = 3
) -> np.ndarray:
    """Decodes an image, cuts out its central square and resizes that.

    Shrinking averages areas (Pillow's box filter), enlarging is bicubic. A camera's orientation
    tag is obeyed, transparency is dropped, and of an animation the first frame is taken.

    Args:
        file: a path or an open file.
        where: what to call it in an error.
        image_size: side in pixels; 0 keeps the image whole, as it is.
        channels: 3 for colour, 1 for grey.

    Returns:
        uint8 `[H,W,C]`.

    Raises:
        UserError: no image of a format that a folder may hold, a damaged one, one of over 64
            million pixels, or one of more than 8 bits per channel.
    """
    try:
        with Image.open(file, formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise UserError(
                    f"{where} is {image.width}×{image.height} pixels: over {_MAX_PIXELS} in all"
                )
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{where} has more than 8 bits per channel: convert it to 8 first")
            image = ImageOps.exif_transpose(image).convert(_MODES[channels])
    except UserError:
        raise
    # Pillow's decoders raise almost any exception on damaged files.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"can't read image {where}: {reason}") from None
    if image_size:
        image = _square(image, image_size)
    return np.asarray(image).reshape(image.height, image.width, channels)


def _square(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    filter_ = Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC
    return image if side == size else image.resize((size, size), filter_)
