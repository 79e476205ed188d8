"""Pictures with captions: from a folder, and as a source of a batch's texts.

NAME.png with NAME.txt or NAME.caption beside it                      kohya
metadata.jsonl, {"file_name": "NAME.png", "text": "…"} in each line   datasets, diffusers
metadata.csv or captions.csv, with the columns file_name and text     datasets
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.data.folder import (
    BACKGROUND,
    FolderSource,
    check_colour,
    images_in,
    note_on_size,
)
from diffjax.data.sources import (
    Batch,
    DataSet,
    Example,
    Source,
    SplitSeed,
    TestFraction,
    stratified_split,
)
from diffjax.errors import UserError, nearest
from diffjax.host.files import place_of
from diffjax.kinds import AtLeastOne

CAPTION = "caption"
"""The name of the captions in a batch, texts `[B]`."""
TABLES = ("metadata.jsonl", "metadata.csv", "captions.csv")
_BESIDE = (".txt", ".caption")
_NAME, _TEXT = "file_name", "text"
_HOW = (
    "write NAME.txt beside each NAME.png, or metadata.jsonl with file_name and text in each line; "
    "or set data.caption to one text for all"
)


def captioned_folder(
    path: str = "data/pictures",
    image_size: AtLeastOne[int] = 512,
    test_fraction: TestFraction = 0.0,
    split_seed: SplitSeed = 0,
    background: str = BACKGROUND,
    caption: str = "",
) -> DataSet:
    """A data set of pictures with captions, from a folder; subfolders are searched too.

    Captions lie beside the pictures, each as `NAME.txt` or `NAME.caption`, or in one table,
    `metadata.jsonl`, `metadata.csv` or `captions.csv`, with `file_name` and `text` in each line.
    All are UTF-8. Line breaks and repeated blanks in a caption become one blank.

    Args:
        path: the folder.
        image_size: the side of the pictures in pixels: the central square is cropped and resized
            (`diffjax.data.folder.read_image`).
        test_fraction: the fraction of pictures for testing; with 0 there are none.
        split_seed: the seed of the split.
        background: the colour behind transparent pixels, by name or as `#rrggbb`.
        caption: of pictures that have none, such as "a photo of sks dog"; with "" each picture
            needs its own.

    Raises:
        UserError: as `image_folder`; a picture without a caption, a caption of no picture, a file
            of captions that can't be read.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as path:
        ...     Image.new("RGB", (40, 30)).save(Path(path) / "apple.png")
        ...     _ = (Path(path) / "apple.txt").write_text("a red apple")
        ...     captioned_folder(path, image_size=16).train.gather([0])["caption"].tolist()
        ['a red apple']
    """
    check_colour(background)
    root = place_of(path)
    files = images_in(root)
    captions = read_captions(root, files, caption)
    train, test = stratified_split(np.zeros(len(files), np.int32), test_fraction, split_seed)

    def source(rows: np.ndarray) -> Source:
        labels = np.zeros(len(rows), np.int32)
        chosen = tuple(files[row] for row in rows)
        pictures = FolderSource(root, chosen, labels, image_size, 3, background)
        return CaptionedSource(pictures, tuple(captions[row] for row in rows))

    return DataSet(
        root.resolve().name,
        source(train),
        source(test),
        (image_size, image_size, 3),
        0,
        (),
        notes=note_on_size(root, files, image_size),
    )


@dataclass(frozen=True, eq=False, repr=False)
class CaptionedSource(Source):
    """The pictures of a source with their captions, `caption` in a batch, texts `[B]`.

    Args:
        pictures: the source.
        captions: one for each picture.

    Example:
        >>> from diffjax.data import digits
        >>> test = digits().test
        >>> CaptionedSource(test, ("a digit",) * len(test)).gather([0, 1])["caption"].tolist()
        ['a digit', 'a digit']
    """

    pictures: Source
    captions: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.captions) != len(self.pictures):
            raise UserError(f"{len(self.pictures)} pictures have {len(self.captions)} captions")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Example:
        return self.pictures[index]

    def gather(self, rows: Sequence[int] | np.ndarray) -> Batch:
        batch: Any = self.pictures.gather(rows)
        return batch | {CAPTION: np.array([self.captions[int(row)] for row in rows], np.str_)}

    @property
    def pixels(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.pictures.pixels

    def fingerprint(self) -> str:
        """SHA-256 of the pictures' fingerprint and of the captions."""
        digest = hashlib.sha256(self.pictures.fingerprint().encode())
        digest.update(json.dumps(self.captions).encode())
        return digest.hexdigest()


def read_captions(root: Path, files: Sequence[str], otherwise: str = "") -> list[str]:
    """The captions of pictures in a folder, in their order.

    Args:
        root: the folder.
        files: of the pictures, relative to it.
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
        found = _in_table(root / tables[0], files)
    else:
        found = {file: _read(text) for file, text in beside.items() if text}
    missing = [file for file in files if not found.get(file)]
    if missing and not otherwise:
        if len(missing) == len(files):
            raise UserError(f"{root} has pictures and no captions: {_HOW}")
        more = f" (nor have {len(missing) - 1} more)" if len(missing) > 1 else ""
        where = f"a line in {tables[0]}" if tables else f"{Path(missing[0]).stem}.txt beside it"
        raise UserError(
            f"{root / missing[0]} has no caption{more}: write {where}, or set data.caption to the "
            "caption of all that have none"
        )
    return [found.get(file) or otherwise for file in files]


def _beside(picture: Path) -> Path | None:
    """The file with the caption of a picture."""
    there = [picture.with_suffix(end) for end in _BESIDE if picture.with_suffix(end).is_file()]
    return there[0] if there else None


def _read(file: Path) -> str:
    return " ".join(_text(file).split())


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"can't read {file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is not UTF-8 ({error}): save it as such") from None


def _in_table(file: Path, files: Sequence[str]) -> dict[str, str]:
    """The captions of a table by picture; "" where a line has an empty one."""
    rows = _rows_of_json if file.suffix == ".jsonl" else _rows_of_csv
    known, found = set(files), {}
    for number, row in rows(file, _text(file)):
        where = f"{file}, line {number}"
        for name in (_NAME, _TEXT):
            if not isinstance(row.get(name), str):
                raise UserError(f"{where} has no text {name!r}; {nearest(name, _names(row))}")
        picture = Path(row[_NAME]).as_posix()
        if picture not in known:
            raise UserError(f"{where}: there is no picture {picture}; {nearest(picture, files)}")
        if picture in found:
            raise UserError(f"{where}: {picture} has a caption already, in a line above")
        found[picture] = " ".join(row[_TEXT].split())
    return found


def _rows_of_json(file: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}, line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number} is no JSON object with {_NAME} and {_TEXT}")
        yield number, row


def _rows_of_csv(file: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise UserError(f"{file} is no CSV after line {rows.line_num}: {error}") from None


def _names(row: Mapping[Any, Any]) -> Iterable[str]:
    return [str(name) for name in row if name is not None]
