"""Small vocabularies in the files that lie beside published text encoders."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path

AWKWARD = (
    "",
    " ",
    "a red apple",
    "  A  RED\tapple\n ",
    "naïve café, ÀÉ; \u0041\u030a",
    "日本語のテキスト 中文",
    "an emoji 🍎 and 👩‍🚀 with 🏳️‍🌈",
    "&lt;b&gt; &amp;amp; &#39;quoted&#39;",
    "don't we'll I'm it's",
    "12345 3.14 1e-5",
    "<|endoftext|> inside <|startoftext|>",
    "</s> <pad> [SEP] [MASK] <extra_id_0>",
    "zero\u200bwidth\ufeff and nbsp\u00a0\u3000wide",
    "ﬁ ① Ⅳ ½ ㎏",
    "wow!!! (really?) #1 @you",
    "\x00\x07control",
    "العربية עברית",
)
"""Texts that tokenizers treat unlike each other."""


def _bytes_of_words() -> list[str]:
    """The 256 characters that stand for bytes in byte-level encodings."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in plain)
    return [*map(chr, plain), *(chr(256 + i) for i, _ in enumerate(others))]


_MERGES = ("a p", "ap p", "l e</w>", "app le</w>", "r e", "re d</w>", "o w</w>", "w ow</w>")


def write_clip(folder: Path, pad: str = "<|endoftext|>", merges: Sequence[str] = _MERGES) -> Path:
    """`vocab.json` and `merges.txt`, as beside CLIP; "!" has the id 0, as there."""
    letters = _bytes_of_words()
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [merge.replace(" ", "") for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    ids = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    lines = "\n".join(["#version: 0.2", *merges, ""])
    (folder / "merges.txt").write_text(lines, encoding="utf-8")
    config = {"model_max_length": 9, "pad_token": pad, "tokenizer_class": "CLIPTokenizer"}
    how = {"__type": "AddedToken", "normalized": True, "lstrip": False}
    config |= {"eos_token": {"content": "<|endoftext|>", **how, "rstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_bert(folder: Path) -> Path:
    """`vocab.txt`, as beside BERT."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [chr(code) for code in range(33, 127)] + [f"##{chr(c)}" for c in range(97, 123)]
    words += ["red", "app", "##le", "日"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


PIECES = (
    [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -3.0), ("▁red", -4.0)]
    + [("▁app", -5.0), ("le", -4.5), ("▁apple", -7.0)]
    + [(chr(code), -9.0 - code / 100) for code in range(97, 123)]
)


def write_t5(folder: Path) -> Path:
    """`spiece.model`, as beside T5, without a table that normalises."""
    folder.mkdir(parents=True, exist_ok=True)
    content = b""
    for text, score in PIECES:
        piece = _field(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        content += _field(1, piece)
    trainer = b"\x18\x01" + b"\xc0\x02\x02"  # model_type = unigram, unk_id = 2
    (folder / "spiece.model").write_bytes(content + _field(2, trainer))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 12}', encoding="utf-8")
    return folder


def _field(number: int, content: bytes) -> bytes:
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content
