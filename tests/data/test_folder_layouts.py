"""A folder of images as others lay it out: `train` and `val`, labels in a table, any shape."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffjax.data.image_folders.folder import image_folder
from diffjax.data.image_folders.headers import Headers
from diffjax.data.pipeline import batches
from diffjax.data.sources import DataSet
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.host.run_files import read_json
from diffjax.loop.loop import train
from diffjax.spec import spec
from tests.support.tiny_run import tiny_config


def save(file: Path, size=(2, 2), grey: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(file)


def found(data: DataSet) -> list[list[tuple[str, str]]]:
    """Names and classes of the training and of the test images."""
    parts: Any = (data.train, data.test)
    names = data.label_names or ("",)
    return [
        [(file, names[label]) for file, label in zip(x.files, x.labels, strict=True)] for x in parts
    ]


@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "test"])
def test_train_and_val_are_the_split(tmp_path, held_out):
    for name in ("train/cat/0.png", "train/dog/0.png", f"{held_out}/dog/1.png"):
        save(tmp_path / name)
    data = image_folder(str(tmp_path), image_size=2)
    assert found(data) == [
        [("train/cat/0.png", "cat"), ("train/dog/0.png", "dog")],
        [(f"{held_out}/dog/1.png", "dog")],
    ]
    assert data.facts["testing"] == f"1 in the folder {held_out}"


def test_val_comes_before_test_and_train_alone_is_split_by_chance(tmp_path):
    for i in range(4):
        save(tmp_path / f"train/{i}.png")
    alone = image_folder(str(tmp_path), image_size=2, test_fraction=0.25)
    assert list(map(len, found(alone))) == [3, 1]
    for name in ("val/a.png", "test/b.png"):
        save(tmp_path / name)
    data = image_folder(str(tmp_path), image_size=2, test_fraction=0.25)
    assert (data.num_classes, len(data.train)) == (0, 4)
    assert found(data)[1] == [("val/a.png", "")]


def test_train_beside_other_classes_is_a_class(tmp_path):
    for name in ("train", "bus"):
        save(tmp_path / name / "0.png")
    assert image_folder(str(tmp_path), image_size=2, test_fraction=0).label_names == (
        "bus", "train",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("val/cow/0.png", "val/cat/0.png"), "val has the class 'cow', which .*train lacks; "),
        (("val/0.png",), "train has classes, and .*val has none: sort it, or move it away"),
    ],
)
def test_a_val_of_other_classes_is_refused(tmp_path, files, message):
    for name in ("train/cat/0.png", *files):
        save(tmp_path / name)
    with pytest.raises(UserError, match=message):
        image_folder(str(tmp_path))


CAT, DOG = ("deep/0.png", "cat"), ("1.png", "dog")
TABLES = {
    "metadata.csv": "file_name,label\ndeep/0.png,cat\n1.png,dog\n",
    "metadata.jsonl": '{"file_name": "1.png", "label": "dog"}\n'
    '{"file_name": "deep/0.png", "label": " cat"}',
    "labels.csv": "label,file_name,sex\ndog,1.png,f\n\ncat,./deep/0.png,m\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_labels_are_from_a_table(tmp_path, name):
    for file in ("deep/0.png", "1.png"):
        save(tmp_path / file)
    (tmp_path / name).write_text(TABLES[name])
    data = image_folder(str(tmp_path), image_size=2, test_fraction=0)
    assert found(data)[0] == [DOG, CAT]
    assert data.facts["classes"] == f"from {name}: cat 1, dog 1"


def test_a_table_elsewhere_with_columns_of_other_names(tmp_path):
    """The first column is the images'; classes that are numbers are in their order."""
    for i in range(3):
        save(tmp_path / f"pictures/{i}.png")
    table = tmp_path / "list.csv"
    table.write_text("picture,age\n0.png,10\n2.png,9\n1.png,9\n")
    for place in (str(table), "../list.csv"):
        how: Any = {"labels": place, "label_column": "age", "test_fraction": 0}
        data = image_folder(str(tmp_path / "pictures"), 2, **how)
        assert data.label_names == ("9", "10")
        assert found(data)[0] == [("0.png", "10"), ("1.png", "9"), ("2.png", "9")]


@pytest.mark.parametrize("where", ["both", "root"])
def test_tables_of_train_and_val(tmp_path, where):
    for part in ("train", "val"):
        save(tmp_path / part / "0.png")
        if where == "both":
            (tmp_path / part / "metadata.csv").write_text("file_name,label\n0.png,cat")
    if where == "root":
        lines = "file_name,label\nval/0.png,cat\ntrain/0.png,cat"
        (tmp_path / "metadata.csv").write_text(lines)
    assert found(image_folder(str(tmp_path), image_size=2)) == [
        [("train/0.png", "cat")],
        [("val/0.png", "cat")],
    ]


def test_a_table_without_labels_leaves_them_to_subfolders(tmp_path):
    save(tmp_path / "cat/0.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\ncat/0.png,a cat")
    data = image_folder(str(tmp_path), image_size=2, test_fraction=0)
    assert found(data)[0] == [("cat/0.png", "cat")]
    assert data.facts["classes"] == (
        "from subfolders: cat 1 (metadata.csv has no column label, but file_name, text)"
    )
    with pytest.raises(UserError, match=r"=txt: no such column of .*csv; did you mean 'text'"):
        image_folder(str(tmp_path), label_column="txt")
    (tmp_path / "metadata.csv").unlink()
    with pytest.raises(UserError, match=r"label_column=breed: no such column in .*without a table"):
        image_folder(str(tmp_path), label_column="breed")


@pytest.mark.parametrize(
    ("table", "how", "message"),
    [
        ("file_name,label\n0.png,cat", {}, r"1.png has no label in .*\(nor have 1 more\): write"),
        ("file_name,label\n0.png,a\n1.png,\n2.png,b", {}, r"1.png has no label in .*csv: write"),
        ("file_name,label\n9.png,cat", {}, "line 2: there is no picture 9.png; did you mean"),
        ("file_name,label\n0.png,a\n0.png,b", {}, "line 3: 0.png has a label already"),
        ("file_name,label\n0.png,a", {"labels": "metadata.csv", "label_column": "lable"},
         "line 2 has no text 'lable'; did you mean 'label'"),
        ("", {"labels": "gone.csv"}, "data.labels=gone.csv: there is no such file, nor .*gone.csv"),
        ("", {"labels": "metadata.csv"}, "0.png has no label in"),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit_end_in_one_line(tmp_path, table, how, message):
    for i in range(3):
        save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.csv").write_text(table)
    with pytest.raises(UserError, match=message) as error:
        image_folder(str(tmp_path), image_size=2, **how)
    assert "\n" not in str(error.value)


def test_buckets_keep_the_shape_of_training_images(tmp_path):
    """Of a step of 2 pixels and 4² there are 2×8, 4×4 and 8×2; references are squares."""
    for i, size in enumerate([(30, 30), (40, 10), (10, 40), (33, 9), (20, 22)]):
        save(tmp_path / f"{i}.png", size, grey=50 * i)
    data = image_folder(str(tmp_path), image_size=4, channels=1, buckets=2, test_fraction=0)
    shapes = {bucket.image_shape: len(bucket.rows) for bucket in data.train.buckets}
    assert shapes == {(2, 8, 1): 2, (4, 4, 1): 2, (8, 2, 1): 1}
    assert data.train.pixels
    assert (data.image_shape, len(data.reference)) == ((4, 4, 1), 5)
    assert data.reference.gather(range(5))["image"].shape == (5, 4, 4, 1)
    stream = batches(data.train, batch_size=2, seed=0)
    for _ in range(6):
        batch = next(stream)
        assert batch["image"].shape[1:] in shapes
    assert "buckets=2" in data.facts["shape"]
    assert "tests are of squares" in data.facts["shape"]
    with pytest.raises(UserError, match=r"data\.buckets=3 is the step of sizes"):
        image_folder(str(tmp_path), image_size=4, buckets=3)


@pytest.mark.thorough
def test_a_run_on_a_folder_in_buckets_ends_in_a_page(tmp_path):
    for i in range(24):
        size = [(30, 30), (40, 10), (10, 40)][i % 3]
        save(tmp_path / f"pictures/{'ab'[i % 2]}/{i}.png", size, grey=10 * i)
    data = spec(image_folder, path=str(tmp_path / "pictures"), image_size=4, buckets=2)
    config = tiny_config("model=tiny", data=data)
    config.evaluation.extractor = spec(pixel_features, size=2)
    page = train(config, tmp_path / "run")
    assert page.exists()
    assert read_json(tmp_path / "run/evaluation.json")["num_samples"] > 0  # type: ignore


def test_the_size_that_suits_is_that_of_nine_pictures_in_ten():
    def suited(*shorter):
        return Headers(np.array([[side, side + 9] for side in shorter]), 0, 0).suited_size

    assert suited(*[30] * 18, 2, 500) == 24
    assert suited(*[29] * 2, *[64] * 17) == 24
    assert (suited(1), suited(8), suited(63), suited(5_000)) == (8, 8, 56, 64)
    assert Headers(np.zeros((0, 2), int), 0, 0).suited_size == 64


def test_the_facts_say_what_becomes_of_the_images(tmp_path):
    for i in range(10):
        Image.new("RGBA" if i < 3 else "RGB", (80, 40)).save(tmp_path / f"{i}.png")
    facts = image_folder(str(tmp_path), image_size=40).facts
    assert facts == {
        "sizes": "40×80 pixels (height×width) in 10 looked at",
        "image_size": "40: 9 of 10 have sides of at least 40; a multiple of 8, at most 64",
        "shape": "the central square, 50% of an image in the mean; buckets=8 keeps their shape",
        "transparency": "3 of them: laid over white",
        "classes": "none",
        "testing": "1 drawn (test_fraction=0.1)",
    }
    other = image_folder(str(tmp_path), image_size=16).facts
    assert other["image_size"] == "16: 9 of 10 have sides of at least 40; 40 suits them"
