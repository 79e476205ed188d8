"""Tokenizers, from the files that lie beside published text encoders.

| file | kind |
|---|---|
| `tokenizer.json` | any, as the library `tokenizers` writes it |
| `vocab.json` and `merges.txt` | byte-pair encoding of CLIP |
| `vocab.txt` | WordPiece of BERT |
| `spiece.model` | unigram model of SentencePiece, of T5 |

`tokenizer_config.json` and `special_tokens_map.json` name the special tokens and the length.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.errors import UserError
from diffjax.host.files import place_of
from diffjax.pretrained.folders import read_object
from diffjax.text.spiece import read_spiece

FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
"""The names of all files that a tokenizer may be read from."""
_LOG = logging.getLogger("diffjax")
_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_EXTRA_IDS = 100  # of T5: places in a text that its decoder fills
_NO_LENGTH = 10**6  # transformers writes 10³⁰ for "any"
_SHOWN = 40


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Texts as numbers of tokens: `begin`, up to so many tokens of the text, `end`, padding.

    Attributes:
        library: a tokenizer of the library `tokenizers`, without truncation and padding.
        begin: the ids before a text; one for CLIP and BERT, none for T5.
        end: the ids after it, one.
        pad: the id of padding: the end for CLIP L, 0 for CLIP bigG (where it is "!"), T5 and BERT.
        length: the number of tokens of a text with `begin`, `end` and padding; 77 for CLIP, 256 or
            512 for T5.
    """

    library: Any
    begin: tuple[int, ...]
    end: tuple[int, ...]
    pad: int
    length: int

    @property
    def room(self) -> int:
        """The number of tokens of a text alone."""
        return self.length - len(self.begin) - len(self.end)

    def __call__(self, texts: Sequence[str], chunks: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The ids of texts, and a mask that is true where there is a token.

        A text longer than `room` is read in several chunks, each with a begin and an end of its
        own. What is longer than all chunks is cut; the log says both.

        Args:
            texts: any, also empty ones.
            chunks: the number of chunks.

        Returns:
            `[B, chunks, length]` int32 and bool. The mask of a chunk beyond a text is false.

        Raises:
            UserError: one is no text, or has parts that Unicode has no bytes for.
        """
        ids = np.full((len(texts), chunks, self.length), self.pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, text in enumerate(texts):
            tokens = self.tokens(text)
            self._say_if_long(text, len(tokens), chunks)
            for i in range(chunks):
                part = tokens[i * self.room : (i + 1) * self.room]
                whole = [*self.begin, *part, *self.end]
                ids[row, i, : len(whole)] = whole
                mask[row, i, : len(whole)] = bool(part) or i == 0
        return ids, mask

    def tokens(self, text: str) -> list[int]:
        """The ids of a text alone, however long.

        Raises:
            UserError: it is no text, or has parts that Unicode has no bytes for.
        """
        if not isinstance(text, str):
            raise UserError(f"a prompt is a text, and {text!r} is not one: put it in quotes")
        try:
            return self.library.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as error:
            raise UserError(f"the prompt {text!r} is no text of Unicode: {error}") from error

    def _say_if_long(self, text: str, count: int, chunks: int) -> None:
        if count <= self.room:
            return
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
        if count > chunks * self.room:
            most = chunks * self.room
            _LOG.warning(
                "a prompt of %d tokens is cut after %d: %s; %d chunks would read all of it",
                *(count, most, shown, -(-count // self.room)),
            )
        else:
            _LOG.info("a prompt of %d tokens is read in chunks of %d: %s", count, self.room, shown)


def read_tokenizer(folder: str | Path, length: int | None = None) -> Tokenizer:
    """Reads a tokenizer from the files in a folder; the module lists them.

    Args:
        folder: such as `tokenizer` of a folder of diffusers.
        length: the number of tokens of a text with begin, end and padding; by default that of
            `tokenizer_config.json`, or else 512.

    Raises:
        UserError: there are no such files, they can't be read, `tokenizers` is not installed, or
            the length has no place for a text.
    """
    place = place_of(str(folder))
    config = _config(place)
    library = _library()
    found = next((read for name, read in _READERS.items() if (place / name).is_file()), None)
    if found is None:
        raise UserError(
            f"{folder} has no tokenizer: one of {', '.join(_READERS)} is needed "
            "(beside vocab.json also merges.txt)"
        )
    try:
        made = found(library, place, config)
    except UserError:
        raise
    except Exception as error:  # The library raises this class alone.
        raise UserError(f"can't read a tokenizer from {folder}: {error}") from error
    pad = _pad(made, config)
    made.no_padding()
    made.no_truncation()
    whole = made.encode("a").ids
    plain = made.encode("a", add_special_tokens=False).ids
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    begin, end = tuple(whole[:start]), tuple(whole[start + len(plain) :])
    if length is None:
        stated = config.get("model_max_length") or _NO_LENGTH
        length = int(stated) if stated < _NO_LENGTH else 512
    if length <= len(begin) + len(end):
        raise UserError(
            f"length={length} has no place for a text: begin and end are {len(begin) + len(end)}"
        )
    return Tokenizer(made, begin, end, pad, length)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError("texts need the library tokenizers: pip install 'diffjax[text]'") from error
    return tokenizers


def _config(folder: Path) -> dict[str, Any]:
    """The entries of `special_tokens_map.json` and `tokenizer_config.json`; the latter counts."""
    files = folder / "special_tokens_map.json", folder / "tokenizer_config.json"
    entries: dict[str, Any] = {}
    for file in files:
        if file.is_file():
            entries |= {k: x for k, x in read_object(file).items() if x is not None}
    return entries


def _named(config: Mapping[str, Any], name: str, default: str) -> str:
    """The text of a special token, which an entry has alone or among its properties."""
    token = config.get(name, default)
    return str(token.get("content", default)) if isinstance(token, Mapping) else str(token)


def _special(library: Any, config: Mapping[str, Any], defaults: Mapping[str, str]) -> list[Any]:
    """Special tokens, which are found in texts before anything else."""
    kinds = ("single_word", "lstrip", "rstrip", "normalized")
    tokens = []
    for name, default in defaults.items():
        entry = config.get(name)
        how = {k: bool(entry[k]) for k in kinds if k in entry} if isinstance(entry, Mapping) else {}
        tokens.append(library.AddedToken(_named(config, name, default), special=True, **how))
    return tokens


def _pad(made: Any, config: Mapping[str, Any]) -> int:
    """The id of padding: by its name, or as the file has it, or 0."""
    name = _named(config, "pad_token", "")
    found = made.token_to_id(name) if name else None
    return (made.padding or {}).get("pad_id", 0) if found is None else found


def _of_json(library: Any, folder: Path, config: Mapping[str, Any]) -> Any:
    del config
    return library.Tokenizer.from_file(str(folder / "tokenizer.json"))


def _of_clip(library: Any, folder: Path, config: Mapping[str, Any]) -> Any:
    """Byte-pair encoding of lower-case words, each of which ends in `</w>`."""
    defaults = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    names = {name: _named(config, name, default) for name, default in defaults.items()}
    if not (folder / "merges.txt").is_file():
        raise UserError(f"{folder} has vocab.json without merges.txt, which is needed too")
    vocabulary, merges = library.models.BPE.read_file(
        str(folder / "vocab.json"), str(folder / "merges.txt")
    )
    made = library.Tokenizer(
        library.models.BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=names["unk_token"],
        )
    )
    normalizers, before = library.normalizers, library.pre_tokenizers
    spaces = normalizers.Replace(library.Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = before.Split(library.Regex(_CLIP_WORDS), behavior="removed", invert=True)
    made.pre_tokenizer = before.Sequence([words, before.ByteLevel(add_prefix_space=False)])
    made.add_special_tokens(_special(library, config, defaults))
    ends = ((name, made.token_to_id(name)) for name in (names["eos_token"], names["bos_token"]))
    made.post_processor = library.processors.RobertaProcessing(
        *ends, trim_offsets=False, add_prefix_space=False
    )
    if "pad_token" not in config:
        made.enable_padding(pad_id=made.token_to_id(names["pad_token"]))
    return made


def _of_bert(library: Any, folder: Path, config: Mapping[str, Any]) -> Any:
    """WordPiece: the longest pieces of each word from its beginning."""
    defaults = {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "mask_token": "[MASK]",
    }
    names = {name: _named(config, name, default) for name, default in defaults.items()}
    vocabulary = library.models.WordPiece.read_file(str(folder / "vocab.txt"))
    made = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token=names["unk_token"]))
    made.normalizer = library.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    made.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(_special(library, config, defaults))
    first, last = names["cls_token"], names["sep_token"]
    made.post_processor = library.processors.TemplateProcessing(
        single=[first, "$A", last],
        special_tokens=[(name, made.token_to_id(name)) for name in (first, last)],
    )
    return made


def _of_t5(library: Any, folder: Path, config: Mapping[str, Any]) -> Any:
    """The unigram model of SentencePiece, with T5's further ids at its end."""
    defaults = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    vocabulary = read_spiece(folder / "spiece.model")
    count = int(config.get("extra_ids", _EXTRA_IDS))
    extra = [f"<extra_id_{i}>" for i in reversed(range(count))]
    pieces = [*vocabulary.pieces, *((name, 0.0) for name in extra)]
    made = library.Tokenizer(library.models.Unigram(pieces, vocabulary.unknown, False))
    if vocabulary.normalisation:
        made.normalizer = library.normalizers.Precompiled(vocabulary.normalisation)
    before = library.pre_tokenizers
    spaces = before.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    made.pre_tokenizer = before.Sequence([before.WhitespaceSplit(), spaces])
    more = [library.AddedToken(name, special=True) for name in extra]
    made.add_special_tokens([*_special(library, config, defaults), *more])
    last = _named(config, "eos_token", defaults["eos_token"])
    made.post_processor = library.processors.TemplateProcessing(
        single=["$A", last], special_tokens=[(last, made.token_to_id(last))]
    )
    return made


_READERS = {
    "tokenizer.json": _of_json,
    "vocab.json": _of_clip,
    "spiece.model": _of_t5,
    "vocab.txt": _of_bert,
}
