"""Samples as files that other codes write and read: a folder of images, or an `.npz` as ADM's."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffjax.data import DataSet, to_float, to_uint8
from diffjax.data.archives import read_npz
from diffjax.data.fingerprints import evenly, hash_parts
from diffjax.data.image_folders.folder import read_image
from diffjax.data.image_folders.listing import images_in
from diffjax.errors import UserError
from diffjax.evaluation.image_statistics import ImageSet
from diffjax.host.files import place_of, write_npz

IMAGES, LABELS = "arr_0", "arr_1"
"""The names that `numpy.savez` gives to arrays without a name, as in ADM's files."""
OURS = "images"
"""The array of samples, float in [-1, 1], in the files of `experiments.sample`."""
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class SampleFiles:
    """Samples of any code, read on demand.

    Attributes:
        images: `[N, H, W, C]` float32 in [-1, 1].
        labels: `[N]` int, the class that each sample is to show; None where it is not known.
        facts: where they come from: `file`, `sha256` and `num_images`.
    """

    images: ImageSet
    labels: np.ndarray | None = field(repr=False)
    facts: dict[str, Any]


def read_samples(path: str | Path, dataset: DataSet) -> SampleFiles:
    """Reads samples, of any code, that are to be compared with a data set.

        samples = read_samples("their_samples.npz", digits())

    An `.npz` has uint8 `[N, H, W, C]` as `arr_0`, and labels, if any, as `arr_1`; or it is a file
    of `experiments.sample`. In a folder images may lie at any depth. Their labels are those of
    subfolders that have the names of the classes.

    Args:
        path: the folder, or the file.
        dataset: what they are to be compared with; images must have its size and channels.

    Raises:
        UserError: no such folder or file, or images of another size or type; the message says how
            to mend them.
    """
    place = place_of(str(path))
    if place.is_dir():
        return _of_folder(place, dataset)
    if not place.is_file() or place.suffix != ".npz":
        raise UserError(f"samples are a folder of images or an .npz file, and {path} is neither")
    return _of_npz(place, dataset)


def _of_folder(root: Path, dataset: DataSet) -> SampleFiles:
    files, (height, width, channels) = images_in(root), dataset.picture_shape

    def read(name: str) -> np.ndarray:
        image = read_image(root / name, str(root / name), channels=channels)
        _check_shape(image.shape, dataset, f"{root / name} is an image of")
        return to_float(image)

    if channels not in (1, 3):
        raise UserError(f"images of {channels} channels have no files: save them as an .npz")
    read(files[0])
    places = [root / name for name in files]
    digest = hashlib.sha256("\n".join(files).encode(errors="surrogateescape"))
    hash_parts(digest, [places[row] for row in evenly(len(places))])
    images = ImageSet(
        (len(files), height, width, channels),
        lambda rows: np.stack([read(files[row]) for row in rows]),
    )
    return SampleFiles(images, _labels_by_folder(files, dataset), _facts(root, digest, len(files)))


def _labels_by_folder(files: Sequence[str], dataset: DataSet) -> np.ndarray | None:
    """Labels by the names of the first folders, if all of them are classes."""
    numbers = {name: number for number, name in enumerate(dataset.label_names)}
    folders = [name.partition("/")[0] if "/" in name else "" for name in files]
    if not dataset.num_classes or not set(folders) <= set(numbers):
        return None
    return np.array([numbers[folder] for folder in folders], np.int32)


def _of_npz(path: Path, dataset: DataSet) -> SampleFiles:
    arrays = read_npz(path, str(path))
    name = IMAGES if IMAGES in arrays else OURS
    if name not in arrays:
        there = ", ".join(sorted(arrays)) or "nothing"
        raise UserError(f"{path} has no {IMAGES}, the array of the images, but {there}")
    images = arrays[name]
    if name == IMAGES and images.dtype != np.uint8:
        raise UserError(
            f"{IMAGES} of {path} is {images.dtype}, and should be uint8: save "
            "(127.5 * (x + 1)).round().clip(0, 255).astype('uint8') of images in [-1, 1]"
        )
    if images.ndim != 4:
        raise UserError(
            f"{name} of {path} has the shape {list(images.shape)}, and should be [N,H,W,C]"
            + (": save x[..., None]" if images.ndim == 3 else "")
        )
    if images.shape[1] == dataset.picture_shape[2] != images.shape[3]:
        raise UserError(
            f"{name} of {path} has the shape {list(images.shape)}, with channels first: save "
            "x.transpose(0, 2, 3, 1)"
        )
    _check_shape(images.shape[1:], dataset, f"{path} has images of")
    labels = arrays.get(LABELS if name == IMAGES else "labels") if dataset.num_classes else None
    if labels is not None:
        _check_labels(labels, len(images), dataset, path)
    digest = hashlib.sha256(np.ascontiguousarray(images).data)

    def take(rows: np.ndarray) -> np.ndarray:
        some = images[rows]
        return to_float(some) if some.dtype == np.uint8 else some.astype(np.float32)

    read = ImageSet(images.shape, take)
    return SampleFiles(read, labels, _facts(path, digest, len(images)))


def _check_shape(shape: Sequence[int], dataset: DataSet, what: str) -> None:
    found, wanted = ("x".join(map(str, each)) for each in (shape, dataset.picture_shape))
    if found != wanted:
        raise UserError(
            f"{what} {found}, and the images of {dataset.name} have {wanted}: compare them with "
            "data of the same size"
        )


def _check_labels(labels: np.ndarray, n: int, dataset: DataSet, path: Path) -> None:
    whole = labels.shape == (n,) and np.issubdtype(labels.dtype, np.integer)
    if not whole or (n and not 0 <= labels.min() <= labels.max() < dataset.num_classes):
        raise UserError(
            f"the labels in {path} should be {n} whole numbers from 0 to {dataset.num_classes - 1}"
        )


def _facts(path: Path, digest: Any, n: int) -> dict[str, Any]:
    return {"file": str(path), "sha256": digest.hexdigest(), "num_images": n}


def write_samples(path: str | Path, images: np.ndarray, **arrays: Any) -> Path:
    """Writes samples as programs that measure FID read them.

    Args:
        path: a file `.npz`, with uint8 `[N, H, W, C]` as `arr_0` (and the labels, if there are any,
            as `arr_1`), as guided-diffusion's; or a folder, which gets a PNG for each image.
        images: `[N, H, W, C]` in [-1, 1].
        **arrays: further arrays for the `.npz`; `labels` are its `arr_1`.

    Returns:
        `path`.

    Raises:
        UserError: a folder that has files already, or images of channels that no PNG has.

    Example:
        >>> import tempfile
        >>> from diffjax.data import digits
        >>> images = np.zeros((3, 8, 8, 1), np.float32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write_samples(f"{folder}/a.npz", images, labels=np.arange(3))
        ...     read_samples(f"{folder}/a.npz", digits()).labels.tolist()
        [0, 1, 2]
    """
    path, pixels = Path(path), to_uint8(images)
    check_place(path, images.shape[-1])
    if path.suffix == ".npz":
        path.parent.mkdir(parents=True, exist_ok=True)
        labels = {LABELS: arrays.pop("labels")} if "labels" in arrays else {}
        write_npz(path, **{IMAGES: pixels}, **labels, **arrays)
        return path
    path.mkdir(parents=True, exist_ok=True)
    digits = max(6, len(str(len(pixels))))
    for number, image in enumerate(pixels):
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        picture.save(path / f"{number:0{digits}}.png", format="PNG")
    return path


def check_place(path: Path, channels: int) -> None:
    """Refuses a place that `write_samples` can't write to, before samples are drawn.

    Raises:
        UserError: a folder that has files already, or images of channels that no PNG has.
    """
    if path.suffix == ".npz":
        return
    if channels not in _MODES:
        raise UserError(f"no PNG has {channels} channels: write {path.with_suffix('.npz')}")
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"{path} has files already, and samples get a folder of their own")
