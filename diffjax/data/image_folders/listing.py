"""The images of a folder, their classes, and which of them are for testing.

FOLDER/CLASS/…/NAME.png                          torchvision's ImageFolder
FOLDER/train/CLASS/…, FOLDER/val/CLASS/…         its two folders for ImageNet
FOLDER/metadata.csv, file_name,label             imagefolder of Hugging Face's datasets
FOLDER/NAME.png                                  no classes
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.data.image_folders.metadata import (
    FILE_NAME,
    METADATA,
    METADATA_CSV,
    column_of,
    rows_of,
)
from diffjax.errors import UserError, nearest
from diffjax.host.files import place_of

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
LABEL = "label"
_TABLES = (METADATA_CSV, METADATA, "labels.csv")
_TRAIN, _HELD_OUT = "train", ("val", "valid", "validation", "test")


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of a folder, in a fixed order.

    Attributes:
        root: the folder.
        files: relative to it; the training images first, if `num_train`.
        labels: int32 `[N]`.
        names: the names of the classes; () without any.
        labels_from: where the labels are from, in words.
        num_train: how many are in the folder `train`; 0 where the folder does not tell them apart.
        held_out: the name of the folder of the others, such as `val`; "" where there is none.
        passed_over: a table without the column of labels, in words; "" where there is none.
    """

    root: Path
    files: tuple[str, ...]
    labels: np.ndarray
    names: tuple[str, ...]
    labels_from: str
    num_train: int = 0
    held_out: str = ""
    passed_over: str = ""


def list_images(root: Path, table: str = "", column: str = LABEL) -> Listing:
    """The images of a folder.

    Where its subfolders are `train` and perhaps `val`, `valid`, `validation` or `test` (the first
    of these that there is), they are the split, and each is such a folder. A table of labels comes
    before labels by subfolders. It is in that folder or in `root`: `metadata.csv`, `metadata.jsonl`
    or `labels.csv` with a column of labels, and one of names of images, `file_name` or the first.

    Args:
        root: the folder.
        table: the table of labels, relative to `root` or not; "" looks for it.
        column: the column of labels in it.

    Raises:
        UserError: the folder is missing, unreadable, empty or ambiguous; an image has no label; a
            link leads nowhere or to a folder above it.
    """
    _check_folder(root)
    try:
        parts = _parts(root)
        tables = [_table(root, root / part, table, column) for part in parts]
        listed = [
            _by_table(root, root / part, found, bool(table), column)
            if found
            else _by_folder(root, root / part)
            for part, found in zip(parts, tables, strict=True)
        ]
    except OSError as error:
        raise UserError(f"can't read {error.filename or root}: {error.strerror}") from None
    names = _classes(listed[0], numbers=tables[0] is not None)
    for part, some in zip(parts[1:], listed[1:], strict=True):
        _check_classes(root / part, _classes(some), root / parts[0], names)
    files = [file for some in listed for file in some]
    numbers = {name: number for number, name in enumerate(names)}
    labels = [numbers.get(name or "", 0) for some in listed for name in some.values()]
    return Listing(
        root,
        tuple(files),
        np.array(labels, np.int32),
        names,
        tables[0].name if tables[0] else "subfolders" if names else "",
        len(listed[0]) if len(parts) > 1 else 0,
        parts[1] if len(parts) > 1 else "",
        _passed_over(root, root / parts[0], column) if tables[0] is None else "",
    )


def images_in(root: Path) -> list[str]:
    """The images in a folder at any depth, relative to it and sorted, whatever its subfolders mean.

    Raises:
        UserError: the folder is missing, unreadable or without images; a link leads nowhere or to a
            folder above it.
    """
    _check_folder(root)
    try:
        return _files_below(root, root)
    except OSError as error:
        raise UserError(f"can't read {error.filename or root}: {error.strerror}") from None


def _check_folder(root: Path) -> None:
    if not root.is_dir():
        raise UserError(f"no folder {root}: set data.path to a folder of images")


def _parts(root: Path) -> list[str]:
    """The folders of training and test images relative to `root`; itself where it has no such."""
    folders = [entry.name for entry in _entries(root) if entry.is_dir()]
    if _TRAIN not in folders or not {_TRAIN, *_HELD_OUT}.issuperset(folders):
        return [""]
    return [_TRAIN, *[name for name in _HELD_OUT if name in folders][:1]]


def _table(root: Path, folder: Path, given: str, column: str) -> Path | None:
    """The table of labels of a folder, if there is one."""
    if given:
        places = [root / given, place_of(given)]
        there = [place for place in places if place.is_file()]
        if not there:
            raise UserError(f"data.labels={given}: there is no such file, nor {places[0]}")
        return there[0]
    for place in dict.fromkeys([folder, root]):
        for name in _TABLES:
            if (place / name).is_file() and column in _first_row(place / name):
                return place / name
    return None


def _passed_over(root: Path, folder: Path, column: str) -> str:
    """The table that has no column of labels, in words.

    Raises:
        UserError: the column is not the usual one, so it was wanted.
    """
    places = [place / name for place in (folder, root) for name in _TABLES]
    there = {place: list(_first_row(place)) for place in places if place.is_file()}
    columns = [str(name) for names in there.values() for name in names]
    if column != LABEL:
        where = f"of {', '.join(map(str, there))}" if there else f"in {root}, without a table"
        raise UserError(
            f"data.label_column={column}: no such column {where}; "
            + nearest(column, columns or [LABEL])
        )
    if not there:
        return ""
    return f"{next(iter(there)).name} has no column {LABEL}, but {', '.join(columns)}"


def _first_row(table: Path) -> Mapping[str, Any]:
    return next((row for _, row in rows_of(table)), {})


def _by_table(
    root: Path, folder: Path, table: Path, given: bool, column: str
) -> dict[str, str | None]:
    """The class of each image below a folder, by the lines of a table.

    Raises:
        UserError: an image has no line, or as `column_of`.
    """
    base = root if given else table.parent
    by = FILE_NAME if FILE_NAME in (row := _first_row(table)) else next(iter(row), FILE_NAME)
    files = _files_below(base, base)
    labels = column_of(table, files, column, "a label", by=by, kinds=(str, int))
    here = _files_below(root, folder)
    names = {file: (root / file).relative_to(base).as_posix() for file in here}
    without = [file for file, name in names.items() if not labels.get(name, "").strip()]
    if without:
        more = f" (nor have {len(without) - 1} more)" if len(without) > 1 else ""
        raise UserError(f"{root / without[0]} has no label in {table}{more}: write one, or move it")
    return {file: labels[name].strip() for file, name in names.items()}


def _by_folder(root: Path, folder: Path) -> dict[str, str | None]:
    """The class of each image below a folder: the name of its subfolder, or none."""
    entries = _entries(folder)
    loose = [entry for entry in entries if is_image(entry)]
    classes = [entry for entry in entries if entry.is_dir()]
    if loose and classes:
        raise UserError(
            f"{folder} holds images ({loose[0].name} …) and subfolders ({classes[0].name} …): "
            "move the images into subfolders, or the subfolders away, or write labels to "
            f"{METADATA_CSV}"
        )
    if not classes:
        return dict.fromkeys(_files_below(root, folder))
    return {file: entry.name for entry in classes for file in _files_below(root, entry)}


def _classes(listed: Mapping[str, str | None], numbers: bool = False) -> tuple[str, ...]:
    """The names of classes in alphabetical order, or in that of numbers."""
    names = {name for name in listed.values() if name is not None}
    in_order = numbers and all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if in_order else None))


def _check_classes(folder: Path, here: Sequence[str], training: Path, known: Sequence[str]) -> None:
    """Refuses test images whose classes are not those of the training images."""
    if bool(here) != bool(known):
        some, others = (training, folder) if known else (folder, training)
        raise UserError(f"{some} has classes, and {others} has none: sort it, or move it away")
    if unknown := [name for name in here if name not in known]:
        raise UserError(
            f"{folder} has the class {unknown[0]!r}, which {training} lacks; "
            + nearest(unknown[0], known)
        )


def _files_below(root: Path, folder: Path) -> list[str]:
    """The images below a folder, relative to `root` and sorted.

    Raises:
        UserError: there is none, or a link that can't be followed.
    """
    above = tuple(place.resolve() for place in (root, *_between(root, folder)))
    found = _images_below(folder, above if folder != root else ())
    if not found:
        raise UserError(f"{folder} holds no images ({' '.join(SUFFIXES)})")
    return sorted(file.relative_to(root).as_posix() for file in found)


def _between(root: Path, folder: Path) -> list[Path]:
    """The folders between two, without both."""
    return [place for place in folder.parents if root in place.parents]


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
        elif is_image(entry):
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


def is_image(path: Path) -> bool:
    """Whether it is a file with the suffix of an image."""
    return path.suffix.lower() in SUFFIXES and path.is_file()
