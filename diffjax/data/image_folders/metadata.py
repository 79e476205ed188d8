"""Tables of what is known of the images of a folder, as `datasets` names them.

metadata.jsonl, {"file_name": "NAME.png", "text": "…"} in each line
metadata.csv, or any CSV file, with the column file_name and others
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffjax.errors import UserError, nearest

METADATA, METADATA_CSV = "metadata.jsonl", "metadata.csv"
FILE_NAME = "file_name"


def column_of(
    file: Path,
    files: Sequence[str],
    column: str,
    what: str,
    by: str = FILE_NAME,
    kinds: type | tuple[type, ...] = str,
) -> dict[str, str]:
    """The texts of a column by image, which lines of a table name relative to its folder.

    Args:
        file: the table, a CSV file or one of JSON lines.
        files: the images.
        column: its name.
        what: the text is, in errors: "a caption".
        by: the column of the names of images.
        kinds: what JSON may have in the place of a text.

    Raises:
        UserError: the file can't be read; a line has no such text, or names no image or one again.
    """
    known, found = set(files), {}
    for number, row in rows_of(file):
        where = f"{file}, line {number}"
        for name, kind in ((by, str), (column, kinds)):
            if not isinstance(row.get(name), kind):
                raise UserError(f"{where} has no text {name!r}; {nearest(name, _names(row))}")
        picture = Path(row[by]).as_posix()
        if picture not in known:
            raise UserError(f"{where}: there is no picture {picture}; {nearest(picture, files)}")
        if picture in found:
            raise UserError(f"{where}: {picture} has {what} already, in a line above")
        found[picture] = str(row[column])
    return found


def rows_of(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The lines of a table with their numbers.

    Raises:
        UserError: the file can't be read, or is not what its suffix says.
    """
    return (_rows_of_json if file.suffix == ".jsonl" else _rows_of_csv)(file, text_of(file))


def text_of(file: Path) -> str:
    """The content of a text file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: it can't be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"can't read {file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is not UTF-8 ({error}): save it as such") from None


def _rows_of_json(file: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}, line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number} is no JSON object with {FILE_NAME} and others")
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
