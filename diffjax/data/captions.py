"""Folders of images with a caption each."""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from diffjax.data.folder import (
    BACKGROUND,
    FolderSource,
    check_colour,
    entries_of,
    is_image,
)
from diffjax.data.sources import DataSet, SplitSeed, TestFraction, stratified_split
from diffjax.errors import UserError
from diffjax.host.files import place_of
from diffjax.kinds import AtLeastOne, Range

METADATA = "metadata.jsonl"
TRAIN, TEST = "train", "test"


def captioned_folder(
    path: str = "data/captioned",
    image_size: AtLeastOne[int] = 64,
    channels: Annotated[int, Range("[1, 3]")] = 3,
    test_fraction: TestFraction = 0.05,
    split_seed: SplitSeed = 0,
    background: str = BACKGROUND,
) -> DataSet:
    """A data set from a folder of images of any size, each with a text.

    Captions are in `metadata.jsonl`, in each line an object such as
    `{"file_name": "apple.png", "text": "a red apple"}` (the form of the Hugging Face hub), or in
    `apple.txt` beside `apple.png` (the form of LoRA trainers), in UTF-8. Where the folder has the
    folders `train` and `test`, each is such a folder, and the split is theirs.

    A network is trained on the states of the captions, which `experiments.encode_latents --text`
    stores beside the latents. Without them captions have no influence.

    Args:
        path: the folder.
        image_size: the side of the images in pixels: the central square is cropped and resized.
        channels: 3 for colour, 1 for grey.
        test_fraction: the fraction of images for testing, without the folders `train` and `test`.
        split_seed: the seed of that split.
        background: the colour behind transparent pixels, by name or as `#rrggbb`.

    Raises:
        UserError: there is no such folder; an image has no caption, or a caption no image; a file
            of captions is damaged.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as path:
        ...     for i in range(4):
        ...         Image.new("RGB", (40, 30)).save(Path(path) / f"{i}.png")
        ...         _ = (Path(path) / f"{i}.txt").write_text(f"picture {i}")
        ...     data = captioned_folder(path, image_size=16, test_fraction=0.25)
        ...     len(data.train), data.test.captions
        (3, ('picture 3',))
    """
    check_colour(background)
    root = place_of(path)
    if not root.is_dir():
        raise UserError(f"no folder {root}: set data.path to a folder of images with captions")
    parts = [root / name for name in (TRAIN, TEST)]
    apart = parts[0].is_dir()
    listed = [_captions(part) if part.is_dir() else {} for part in (parts if apart else [root])]
    files = [file.relative_to(root).as_posix() for captions in listed for file in captions]
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
    return DataSet(root.resolve().name, source(rows[0]), source(rows[1]), shape, 0, ())


def attributes_in(path: str) -> list[dict[str, str]]:
    """The attributes of the images of `captioned_folder(path)`, those for training first.

    They are the entry `attributes` of a line of `metadata.jsonl`, such as `{"colour": "green"}`;
    empty where there is none. The folder has the folders `train` and `test`.

    Raises:
        UserError: a list is missing or damaged.
    """
    found = []
    for part in (TRAIN, TEST):
        folder = place_of(path) / part
        if not (folder / METADATA).is_file():
            raise UserError(f"there is no {folder / METADATA}, which has the attributes of images")
        rows = _rows(folder / METADATA)
        images = [entry.name for entry in entries_of(folder) if is_image(entry)]
        each = [rows.get(name, {}).get("attributes", {}) for name in images]
        found += [{str(k): str(x) for k, x in some.items()} for some in each]
    return found


def _captions(folder: Path) -> dict[Path, str]:
    """The caption of each image in a folder, by path."""
    images = [entry for entry in entries_of(folder) if is_image(entry)]
    if not images:
        raise UserError(f"{folder} holds no images")
    listed = folder / METADATA
    captions = _listed(listed) if listed.is_file() else None
    found = {}
    for image in images:
        beside = image.with_suffix(".txt")
        if captions is None and beside.is_file():
            found[image] = " ".join(_text_of(beside).split())
        elif captions is not None and image.name in captions:
            found[image] = captions.pop(image.name)
        else:
            where = listed if captions is not None else beside
            raise UserError(f"{image} has no caption in {where}")
    if captions:
        raise UserError(f"{listed} has a caption of {next(iter(captions))}, and no such image")
    return found


def _listed(file: Path) -> dict[str, str]:
    """The captions by the names of files, as `metadata.jsonl` has them."""
    return {name: " ".join(row["text"].split()) for name, row in _rows(file).items()}


def _rows(file: Path) -> dict[str, dict[str, Any]]:
    """The lines of `metadata.jsonl` by the names of files."""
    found = {}
    for number, line in enumerate(_text_of(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            right = all(isinstance(row[key], str) for key in ("file_name", "text"))
            right &= isinstance(row.get("attributes", {}), dict)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            row, right = {}, False
        if not right:
            raise UserError(f'{file}:{number} is not {{"file_name": "…", "text": "…"}}')
        found[row["file_name"]] = row
    return found


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"can't read captions from {file}: {reason}") from error
