"""Tokenizers from a checkpoint's own files: texts as the numbers of their tokens.

`tokenizer.json` is that of the library tokenizers; `vocab.json` and `merges.txt` are the byte pairs
of CLIP. `tokenizer_config.json` has the length and the token that texts are filled up with.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.errors import UserError
from diffjax.pretrained.folders import read_object

_WHOLE, _SETTINGS, _SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
_VOCABULARY, _MERGES = "vocab.json", "merges.txt"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""The pieces of a text of which CLIP's vocabulary has parts (Radford et al. 2021)."""
_LONGEST = 77


@dataclass(frozen=True)
class Tokenizer:
    """Texts as numbers of tokens, all of one length: cut off, or filled up.

    Attributes:
        backend: of the library tokenizers.
        length: the number of tokens, with those at the start and the end.
        filler: the number of the token that a text is filled up with.
    """

    backend: Any
    length: int
    filler: int

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """The tokens of each text, int32 `[n, length]`."""
        rows = np.full((len(texts), self.length), self.filler, np.int32)
        for row, encoded in zip(rows, self.backend.encode_batch([*texts]), strict=True):
            ids = encoded.ids
            if len(ids) > self.length:  # The end of the text stays.
                ids = [*ids[: self.length - 1], ids[-1]]
            row[: len(ids)] = ids
        return rows

    def cut_off(self, text: str) -> int:
        """The number of tokens of a text that have no place."""
        return max(0, len(self.backend.encode(text).ids) - self.length)


def read_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer of a text encoder.

    Args:
        folder: as `tokenizer` of a pipeline.

    Raises:
        UserError: files are missing or damaged, or the library tokenizers is not installed.
    """
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise UserError("a prompt needs the library tokenizers: pip install tokenizers") from error
    if not folder.is_dir():
        raise UserError(f"there is no tokenizer: the folder {folder} is missing")
    settings = read_object(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}
    special = read_object(folder / _SPECIAL) if (folder / _SPECIAL).is_file() else {}
    try:
        if (folder / _WHOLE).is_file():
            backend = tokenizers.Tokenizer.from_file(str(folder / _WHOLE))
            backend.no_padding()
            backend.no_truncation()
        else:
            backend = _of_clip(folder)
    except Exception as error:  # The library raises plain exceptions.
        if isinstance(error, UserError):
            raise
        raise UserError(f"can't read the tokenizer in {folder}: {error}") from error
    name = _token(settings.get("pad_token") or special.get("pad_token") or _END)
    filler = backend.token_to_id(name)
    if filler is None:
        raise UserError(f"{folder}: its vocabulary lacks the token {name!r} for filling up")
    length = settings.get("model_max_length", _LONGEST)
    length = int(length) if length < 10**6 else _LONGEST
    return Tokenizer(backend, length, filler)


def _token(entry: Any) -> str:
    return str(entry["content"]) if isinstance(entry, Mapping) else str(entry)


def _of_clip(folder: Path) -> Any:
    from tokenizers import Regex, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    for name in (_VOCABULARY, _MERGES):
        if not (folder / name).is_file():
            raise UserError(f"there is no tokenizer: {folder} has neither {_WHOLE} nor {name}")
    vocabulary = json.loads((folder / _VOCABULARY).read_text(encoding="utf-8"))
    lines = (folder / _MERGES).read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    bpe = BPE(
        vocab=vocabulary,
        merges=merges,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
        unk_token=_END,
    )
    backend = Backend(bpe)
    blanks = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
    words = rf"{_START}|{_END}|{_WORDS}".replace("|>", r"\|>").replace("<|", r"<\|")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    ends = ((name, vocabulary[name]) for name in (_END, _START))
    backend.post_processor = processors.RobertaProcessing(
        *ends, trim_offsets=False, add_prefix_space=False
    )
    return backend
