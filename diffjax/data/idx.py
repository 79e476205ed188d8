"""MNIST, Fashion-MNIST and other data sets in the idx format: four files in a folder."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from diffjax.data.archives import check_unpacked
from diffjax.data.sources import ArraySource, DataSet
from diffjax.errors import UserError
from diffjax.host.files import place_of

_UINT8 = 0x08
_MAX_GZIP_RATIO = 1032  # the largest ratio that DEFLATE can reach


def fashion_mnist(path: str = "data/fashion-mnist") -> DataSet:
    """Fashion-MNIST: 60,000 training and 10,000 test images of clothes, 28×28 grey, 10 classes.

    Args:
        path: a folder with the four idx files, gzipped or not.

    Raises:
        UserError: a file is missing or damaged.

    References:
        Xiao, Rasul & Vollgraf, Fashion-MNIST, 2017, arXiv:1708.07747.
    """
    names = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
    how_to_get = (
        "Debian's package dataset-fashion-mnist puts them in /usr/share/datasets/fashion-mnist "
        "(set data.path to it); TFDS has them as fashion_mnist"
    )
    return idx_images(path, "fashion_mnist", tuple(names.split(",")), how_to_get)


def mnist(path: str = "data/mnist") -> DataSet:
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, 28×28 grey pixels.

    Args:
        path: a folder with the four idx files, gzipped or not.

    Raises:
        UserError: a file is missing or damaged.

    References:
        LeCun, Bottou, Bengio & Haffner, Gradient-Based Learning Applied to Document Recognition,
        1998.
    """
    return idx_images(path, "mnist", tuple("0123456789"), "TFDS has them as mnist")


def idx_images(
    path: str, name: str, label_names: tuple[str, ...], how_to_get: str = "set data.path"
) -> DataSet:
    """A data set in the file format of MNIST.

    Args:
        path: a folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`,
            `t10k-images-idx3-ubyte` and `t10k-labels-idx1-ubyte`, each plain or with `.gz`.
        name: the name in reports.
        label_names: one name per class.
        how_to_get: the end of the error message if a file is missing.

    Raises:
        UserError: a file is missing or damaged, the counts differ, or a label has no name.
    """
    folder = place_of(path)
    train = _split(folder, "train", len(label_names), how_to_get)
    test = _split(folder, "t10k", len(label_names), how_to_get)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"{folder}: training images are {train.images.shape[1:3]}, test images "
            f"{test.images.shape[1:3]} pixels"
        )
    height, width = train.images.shape[1:3]
    return DataSet(name, train, test, (height, width, 1), len(label_names), label_names)


def _split(folder: Path, prefix: str, num_classes: int, how_to_get: str) -> ArraySource:
    files = [
        _find(folder, f"{prefix}-{kind}-ubyte", how_to_get)
        for kind in ("images-idx3", "labels-idx1")
    ]
    images, labels = read_idx(files[0], ndim=3), read_idx(files[1], ndim=1)
    if len(images) != len(labels):
        raise UserError(f"{files[0]} has {len(images)} images, {files[1]} {len(labels)} labels")
    if not len(images):
        raise UserError(f"{files[0]} holds no images")
    if labels.max() >= num_classes:
        raise UserError(f"{files[1]} has label {labels.max()}, but there are {num_classes} classes")
    return ArraySource(images[..., None], labels.astype(np.int32))


def _find(folder: Path, name: str, how_to_get: str) -> Path:
    for file in (folder / f"{name}.gz", folder / name):
        if file.is_file():
            return file
    raise UserError(f"no {name} or {name}.gz in {folder}: {how_to_get}")


def read_idx(file: Path, ndim: int) -> np.ndarray:
    """Reads an idx file of unsigned bytes, gzipped if its name ends in `.gz`.

    The header is two zero bytes, the type, the number of dimensions and each of them as a
    big-endian uint32. No more bytes are read or decompressed than the header states.

    Args:
        file: the file.
        ndim: the number of dimensions that the file must have.

    Returns:
        A uint8 array.

    Raises:
        UserError: the file can't be read, is not an idx file of `ndim` dimensions, is shorter or
            longer than its header states, or would decompress to more than 256 MB and more than a
            hundred times its size.
    """
    try:
        with open(file, "rb") as raw:
            stream = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
            return _read_stream(cast(BinaryIO, stream), file, ndim)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"can't read {file}: {error}") from None


def _read_stream(stream: BinaryIO, file: Path, ndim: int) -> np.ndarray:
    magic = stream.read(4)
    if magic != bytes((0, 0, _UINT8, ndim)):
        raise UserError(
            f"{file} starts with {magic.hex(' ') or 'nothing'}, not with 00 00 08 {ndim:02x}: "
            f"not an idx file of bytes in {ndim} dimensions"
        )
    header = stream.read(4 * ndim)
    if len(header) < 4 * ndim:
        raise UserError(f"{file} ends within its header")
    shape = struct.unpack(f">{ndim}I", header)
    num_bytes, size = math.prod(shape), file.stat().st_size
    if num_bytes > (_MAX_GZIP_RATIO if file.suffix == ".gz" else 1) * size:
        raise UserError(f"{file} announces {num_bytes} bytes, more than it can hold")
    check_unpacked(num_bytes, size, str(file))
    content = stream.read(num_bytes)
    if len(content) < num_bytes or stream.read(1):
        has = f"only {len(content)}" if len(content) < num_bytes else "more"
        raise UserError(f"{file} announces {num_bytes} bytes and has {has}")
    return np.frombuffer(content, np.uint8).reshape(shape)
