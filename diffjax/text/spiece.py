"""Reads `spiece.model`, a vocabulary of SentencePiece, without its library.

The file is a protocol buffer. Of it the pieces with their scores are needed, which id is unknown,
and the table by which texts are normalised.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from diffjax.errors import UserError

_UNIGRAM = 1
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5  # kinds of values in a protocol buffer


class Vocabulary(NamedTuple):
    """A vocabulary of SentencePiece's unigram model.

    Attributes:
        pieces: each with the logarithm of its probability, in the order of their ids.
        unknown: the id of what is not in the vocabulary.
        normalisation: the table that normalises texts, as SentencePiece compiles it.
    """

    pieces: list[tuple[str, float]]
    unknown: int
    normalisation: bytes


def read_spiece(path: Path) -> Vocabulary:
    """Reads a file of SentencePiece.

    Raises:
        UserError: it can't be read, is no such file, or has no unigram model.
    """
    try:
        content = memoryview(path.read_bytes())
        pieces: list[tuple[str, float]] = []
        trainer: dict[int, object] = {}
        normaliser: dict[int, object] = {}
        for number, value in _fields(content):
            if number == 1:
                piece = dict(_fields(_bytes(value)))
                score = struct.unpack("<f", _bytes(piece[2]))[0] if 2 in piece else 0.0
                pieces.append((str(_bytes(piece[1]), "utf-8"), score))
            elif number in (2, 3):
                (trainer if number == 2 else normaliser).update(_fields(_bytes(value)))
        if not pieces:
            raise ValueError("it has no pieces")
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise UserError(f"{path} is no vocabulary of SentencePiece: {error}") from error
    if trainer.get(3, _UNIGRAM) != _UNIGRAM:
        raise UserError(
            f"{path} has no unigram model, the only kind of SentencePiece that is read: convert it "
            "to tokenizer.json"
        )
    unknown = trainer.get(40, 0)
    table = bytes(_bytes(normaliser.get(2, b"")))
    return Vocabulary(pieces, unknown if isinstance(unknown, int) else 0, table)


def _fields(message: memoryview) -> Iterator[tuple[int, object]]:
    """The numbers and values of a message, one after the other."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        size = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(kind)
        if kind == _BYTES:
            size, at = _varint(message, at)
        if size is None or at + size > len(message):
            raise ValueError(f"it is damaged at byte {at}")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number has too many bytes")


def _bytes(value: object) -> memoryview:
    return memoryview(value)  # type: ignore[arg-type]  # numbers end in a TypeError
