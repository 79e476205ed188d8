"""Folders of images with a caption each.

NAME.png with NAME.txt or NAME.caption beside it                      kohya
metadata.jsonl, {"file_name": "NAME.png", "text": "…"} in each line   datasets, diffusers
metadata.csv or captions.csv, with the columns file_name and text     datasets
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np

from diffjax.data.image_folders.folder import (
    BACKGROUND,
    FolderSource,
    check_colour,
    note_on_size,
)
from diffjax.data.image_folders.headers import Headers
from diffjax.data.image_folders.listing import images_in
from diffjax.data.image_folders.metadata import (
    FILE_NAME,
    METADATA,
    METADATA_CSV,
    column_of,
    rows_of,
    text_of,
)
from diffjax.data.sources import DataSet, SplitSeed, TestFraction, stratified_split
from diffjax.errors import UserError
from diffjax.host.files import place_of
from diffjax.kinds import AtLeastOne, Range

TABLES = (METADATA, METADATA_CSV, "captions.csv")
TRAIN, TEST = "train", "test"
_BESIDE = (".txt", ".caption")
_TEXT, _ATTRIBUTES = "text", "attributes"
_HOW = (
    "write NAME.txt beside each NAME.png, or metadata.jsonl with file_name and text in each line; "
    "or set data.caption to one text for all"
)


def captioned_folder(
    path: str = "data/captioned",
    image_size: AtLeastOne[int] = 64,
    channels: Annotated[int, Range("[1, 3]")] = 3,
    test_fraction: TestFraction = 0.05,
    split_seed: SplitSeed = 0,
    background: str = BACKGROUND,
    caption: str = "",
) -> DataSet:
    """A data set from a folder of images of any size, each with a text; subfolders count too.

    Captions lie beside the images, each as `NAME.txt` or `NAME.caption`, or in one table,
    `metadata.jsonl`, `metadata.csv` or `captions.csv`, with `file_name` and `text` in each line.
    All are UTF-8. Line breaks and repeated blanks in a caption become one blank. Where the folder
    has the folders `train` and `test`, each is such a folder, and the split is theirs.

    A network is trained on the states of the captions, which `experiments.encode_latents --text`
    stores beside the latents. Without them captions have no influence.

    Args:
        path: the folder.
        image_size: the side of the images in pixels: the central square is cropped and resized
            (`diffjax.data.image_folders.folder.read_image`).
        channels: 3 for colour, 1 for grey.
        test_fraction: the fraction of images for testing, without the folders `train` and `test`;
            with 0 there are none.
        split_seed: the seed of that split.
        background: the colour behind transparent pixels, by name or as `#rrggbb`.
        caption: the caption of images that have none, such as "a photo of sks dog"; with "" each
            image needs its own.

    Raises:
        UserError: as `image_folder`; an image has no caption, or a caption no image; a file of
            captions is damaged.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as path:
        ...     for i in range(4):
        ...         Image.new("RGB", (40, 30)).save(Path(path) / f"{i}.png")
        ...         _ = (Path(path) / f"{i}.txt").write_text(f"picture {i}")
        ...     data = captioned_folder(path, image_size=16, test_fraction=0.25)
        ...     len(data.train), data.test.captions
        (3, ('picture 0',))
    """
    check_colour(background)
    root = place_of(path)
    parts = [root / name for name in (TRAIN, TEST)]
    apart = parts[0].is_dir()
    listed = [_listed(part, root, caption) for part in (parts if apart else [root])]
    files = [file for captions in listed for file in captions]
    texts = [text for captions in listed for text in captions.values()]
    if apart:
        rows = np.split(np.arange(len(files)), [len(listed[0])])
    else:
        rows = stratified_split(np.zeros(len(files), np.int32), test_fraction, split_seed)

    def source(rows: np.ndarray) -> FolderSource:
        return FolderSource(
            root,
            tuple(files[row] for row in rows),
            np.zeros(len(rows), np.int32),
            image_size,
            channels,
            background,
            tuple(texts[row] for row in rows),
        )

    shape = (image_size, image_size, channels)
    notes = note_on_size(root, Headers.of(root, files), image_size)
    name = root.resolve().name
    return DataSet(name, source(rows[0]), source(rows[1]), shape, 0, (), notes=notes)


def _listed(folder: Path, root: Path, otherwise: str) -> dict[str, str]:
    """The captions of the images in a folder by name, relative to another one."""
    if folder != root and not folder.is_dir():
        return {}
    files = images_in(folder)
    names = [(folder / file).relative_to(root).as_posix() for file in files]
    return dict(zip(names, read_captions(folder, files, otherwise), strict=True))


def read_captions(root: Path, files: Sequence[str], otherwise: str = "") -> list[str]:
    """The captions of pictures in a folder, in their order.

    Args:
        root: the folder.
        files: the files of the pictures, relative to it.
        otherwise: the caption of pictures without one; with "" they are refused.

    Raises:
        UserError: a picture has no caption or two, a caption has no picture, or a file of captions
            can't be read.
    """
    tables = [name for name in TABLES if (root / name).is_file()]
    beside = {file: _beside(root / file) for file in files}
    if len(tables) > 1 or (tables and any(beside.values())):
        others = tables[1:] or [next(str(x) for x in beside.values() if x)]
        raise UserError(f"{root} has captions twice, in {tables[0]} and {others[0]}: keep one")
    if tables:
        captions = column_of(root / tables[0], files, _TEXT, "a caption")
        found = {file: " ".join(text.split()) for file, text in captions.items()}
    else:
        found = {file: _read(text) for file, text in beside.items() if text}
    missing = [file for file in files if file not in found]
    if missing and not otherwise:
        if len(missing) == len(files):
            raise UserError(f"{root} has pictures and no captions: {_HOW}")
        more = f" (nor have {len(missing) - 1} more)" if len(missing) > 1 else ""
        where = f"a line in {tables[0]}" if tables else f"{Path(missing[0]).stem}.txt beside it"
        raise UserError(
            f"{root / missing[0]} has no caption{more}: write {where}, or set data.caption to the "
            "caption of all that have none"
        )
    return [found.get(file, otherwise) for file in files]


def attributes_in(path: str) -> list[dict[str, str]]:
    """The attributes of the images of `captioned_folder(path)`, those for training first.

    They are the entry `attributes` of a line of `metadata.jsonl`, such as `{"colour": "green"}`;
    none where there is no such entry. The folder has the folders `train` and `test`.

    Raises:
        UserError: a list is missing or damaged.
    """
    found = []
    for part in (TRAIN, TEST):
        folder = place_of(path) / part
        table, attributes = folder / METADATA, {}
        if not table.is_file():
            raise UserError(f"there is no {table}, which has the attributes of images")
        for number, row in rows_of(table):
            some = row.get(_ATTRIBUTES, {})
            if not isinstance(some, dict):
                raise UserError(f"{table}, line {number}: {_ATTRIBUTES} is no JSON object")
            attributes[row.get(FILE_NAME)] = {str(key): str(value) for key, value in some.items()}
        found += [attributes.get(name, {}) for name in images_in(folder)]
    return found


def _beside(picture: Path) -> Path | None:
    """The file with the caption of a picture."""
    there = [picture.with_suffix(end) for end in _BESIDE if picture.with_suffix(end).is_file()]
    return there[0] if there else None


def _read(file: Path) -> str:
    return " ".join(text_of(file).split())
