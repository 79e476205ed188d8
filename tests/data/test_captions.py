"""Captions of pictures: each layout of the field, and what is missing, wrong or there twice."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffjax.data import captioned_folder
from diffjax.data.image_folders.headers import size_of
from diffjax.errors import UserError

TEXTS = {"a.png": "a red apple", "b.png": "a blue whale, by night", "more/c.png": "naïve 🍎"}


def pictures(root: Path, shape=(6, 4)) -> Path:
    for i, name in enumerate(TEXTS):
        (root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", shape, (40 * i, 0, 0)).save(root / name)
    return root


def beside(root, end=".txt"):
    for name, text in TEXTS.items():
        (root / name).with_suffix(end).write_text(text, encoding="utf-8")


def jsonl(root):
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in TEXTS.items()]
    (root / "metadata.jsonl").write_text("\n".join([*lines[::-1], ""]), encoding="utf-8")


def table(root, name="metadata.csv"):
    lines = [f'{name},"{text}"' for name, text in TEXTS.items()]
    (root / name).write_text("\n".join(["file_name,text", *lines]), encoding="utf-8")


WRITE = {
    "txt": beside,
    "caption": lambda root: beside(root, ".caption"),
    "jsonl": jsonl,
    "csv": table,
    "captions.csv": lambda root: table(root, "captions.csv"),
}


@pytest.mark.parametrize("layout", WRITE)
def test_each_picture_has_its_own_caption(layout, tmp_path):
    WRITE[layout](pictures(tmp_path))
    data = captioned_folder(str(tmp_path), image_size=2, test_fraction=0)
    batch = data.train.gather([2, 0])
    assert data.train.captions == tuple(TEXTS.values())
    assert batch["image"][:, 0, 0, 0].tolist() == [80, 0]
    assert data.image_shape == batch["image"].shape[1:] == (2, 2, 3)
    assert (len(data.test), data.num_classes) == (0, 0)


def test_a_caption_is_one_line_and_may_have_a_byte_order_mark(tmp_path):
    pictures(tmp_path)
    (tmp_path / "a.txt").write_text("\ufeff a red \r\n  apple\n\n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b" \n")  # A caption too, of no word.
    data = captioned_folder(str(tmp_path), test_fraction=0, caption="a thing")
    assert data.train.captions == ("a red apple", "", "a thing")


def test_another_caption_is_other_data(tmp_path):
    beside(pictures(tmp_path))
    before = captioned_folder(str(tmp_path), test_fraction=0).train.fingerprint()
    assert before == captioned_folder(str(tmp_path), test_fraction=0).train.fingerprint()
    (tmp_path / "a.txt").write_text("a green apple")
    assert before != captioned_folder(str(tmp_path), test_fraction=0).train.fingerprint()


def _remove(name):
    return lambda root: (root / name).unlink()


def _write(name, text):
    return lambda root: (root / name).write_bytes(text)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("txt", _remove("a.txt"), "a.png has no caption: write a.txt beside it, or set data.capt"),
        ("txt", _write("a.txt", "naïve".encode("latin-1")), r"a.txt is not UTF-8 \(.*save it as"),
        ("txt", jsonl, "has captions twice, in metadata.jsonl and .*a.txt: keep one"),
        ("csv", jsonl, "has captions twice, in metadata.jsonl and metadata.csv: keep one"),
        ("jsonl", _write("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}'),
         r"b.png has no caption \(nor have 1 more\): write a line in metadata.jsonl"),
        ("jsonl", _write("metadata.jsonl", b'\n{"file_name": "a.pgn", "text": "x"}'),
         "line 2: there is no picture a.pgn; did you mean 'a.png'"),
        ("jsonl", _write("metadata.jsonl", b'{"file_name": "a.png", "texts": "x"}'),
         "line 1 has no text 'text'; did you mean 'texts'"),
        ("jsonl", _write("metadata.jsonl", b'{"file_name": "a.png", "text": 3}'), "has no text"),
        ("jsonl", _write("metadata.jsonl", b'{"file_name": "a.png",'), "line 1 is no JSON: "),
        ("jsonl", _write("metadata.jsonl", b'["a.png"]'), "line 1 is no JSON object with file_na"),
        ("csv", _write("metadata.csv", b"file_name,text\na.png,x\na.png,y"),
         "line 3: a.png has a caption already, in a line above"),
        ("csv", _write("metadata.csv", b"file,text\na.png,x"), "has no text 'file_name'; did you"),
        ("csv", _write("metadata.csv", b'file_name,text\na.png,"x'), "is no CSV after line 1: "),
    ],
)  # fmt: skip
def test_what_is_no_caption_ends_in_one_line(layout, change, message, tmp_path):
    WRITE[layout](pictures(tmp_path))
    change(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        captioned_folder(str(tmp_path), image_size=2)
    assert "\n" not in str(error.value)


def test_pictures_without_any_caption_are_refused_with_the_layouts(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*nowhere: set data.path to a folder"):
        captioned_folder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no images"):
        captioned_folder(str(tmp_path))
    message = "has pictures and no captions: write NAME.txt beside each NAME.png, or metadata.jsonl"
    with pytest.raises(UserError, match=re.escape(message)):
        captioned_folder(str(pictures(tmp_path)))


@pytest.mark.parametrize("turned", [False, True])
def test_the_size_of_a_picture_is_that_of_how_it_is_seen(turned, tmp_path):
    tags = Image.Exif()
    tags[274] = 6 if turned else 1
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=tags)
    assert size_of(tmp_path / "a.jpg") == ((6, 4) if turned else (4, 6))
    (tmp_path / "b.png").write_bytes(b"x")
    assert size_of(tmp_path / "b.png") == (0, 0)
    assert np.prod(size_of(tmp_path / "c.png")) == 0
