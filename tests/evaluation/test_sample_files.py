"""Samples of other code: read from a folder or an `.npz`, evaluated, and written for other code."""

import json

import numpy as np
import pytest
from PIL import Image

from diffjax.data import DataSet, to_float
from diffjax.data.sources import ArraySource
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.evaluation.sample_files import check_place, read_samples, write_samples
from diffjax.host.run_files import read_json
from diffjax.reports.run_page import write_report
from diffjax.runs.measuring.foreign_samples import measure_samples

SHAPE = (4, 6, 3)


def pixels(n: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


@pytest.fixture(scope="module")
def data() -> DataSet:
    labels = np.arange(24, dtype=np.int32) % 2
    train, test = (ArraySource(pixels(24, seed), labels) for seed in (0, 1))
    return DataSet("few", train, test, SHAPE, 2, ("cat", "dog"))


def test_what_is_written_is_read_again(data, tmp_path):
    images, labels = pixels(5), np.array([0, 1, 1, 0, 1])
    file = write_samples(tmp_path / "a" / "x.npz", to_float(images), labels=labels, solver="heun")
    with np.load(file) as saved:  # as guided-diffusion's evaluator reads it
        assert saved["arr_0"].dtype == np.uint8
        assert saved["arr_1"].tolist() == labels.tolist()
        np.testing.assert_array_equal(saved["arr_0"], images)
        assert saved["solver"] == "heun"
    folder = write_samples(tmp_path / "pngs", to_float(images))
    assert [path.name for path in sorted(folder.iterdir())] == [f"{i:06}.png" for i in range(5)]
    assert Image.open(folder / "000003.png").size == (6, 4)
    for path, known in ((file, labels.tolist()), (folder, None)):
        found = read_samples(path, data)
        np.testing.assert_array_equal(found.images.take(np.arange(5)), to_float(images))
        assert (None if found.labels is None else found.labels.tolist()) == known
        assert found.facts["file"] == str(path)
        assert found.facts["num_images"] == 5
        assert len(found.facts["sha256"]) == 64


def test_folders_with_the_names_of_classes_are_labels(data, tmp_path):
    for name, shade in (("cat", 3), ("dog", 9)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (6, 4), (shade,) * 3).save(tmp_path / name / "0.png")
    found = read_samples(tmp_path, data)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1]
    assert to_float(np.full(1, 9, np.uint8)) == found.images.take(np.array([1]))[0, 0, 0, 0]
    (tmp_path / "dog").rename(tmp_path / "bird")
    assert read_samples(tmp_path, data).labels is None


def test_a_file_of_our_samples_is_read_too(data, tmp_path):
    images = np.linspace(-1, 1, 3 * 72, dtype=np.float32).reshape(3, *SHAPE)
    np.savez(tmp_path / "ours.npz", images=images, labels=np.array([1, 0, 1]))
    found = read_samples(tmp_path / "ours.npz", data)
    np.testing.assert_array_equal(found.images.take(np.arange(3)), images)
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"arr_0": pixels(3) / 255}, r"is float64, and should be uint8: save \(127.5"),
        ({"arr_0": pixels(3).transpose(0, 3, 1, 2)}, r"save x.transpose\(0, 2, 3, 1\)"),
        ({"arr_0": pixels(3)[..., 0]}, r"should be \[N,H,W,C\]: save x\[..., None\]"),
        ({"arr_0": pixels(3, shape=(8, 8, 3))}, "images of 8x8x3, and the images of few have"),
        ({"x": pixels(3)}, "has no arr_0, the array of the images, but x"),
        ({"arr_0": pixels(3), "arr_1": np.array([0, 1, 2])}, "3 whole numbers from 0 to 1"),
        ({"arr_0": pixels(3), "arr_1": np.array([0.0, 1, 1])}, "3 whole numbers from 0 to 1"),
        ({"arr_0": pixels(2)}, "has 2 samples, and distances need 3"),
    ],
)
def test_a_file_that_cannot_be_compared_is_refused_with_the_fix(data, tmp_path, arrays, said):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=said) as caught:
        measure_samples(tmp_path / "x.npz", data, [pixel_features(2)], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_compared_is_refused(data, tmp_path):
    with pytest.raises(UserError, match="nowhere is neither"):
        read_samples(tmp_path / "nowhere", data)
    with pytest.raises(UserError, match="holds no images"):
        read_samples(tmp_path, data)
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="is an image of 8x8x3, and the images of few have 4x6x3"):
        read_samples(tmp_path, data)
    two = DataSet("two", ArraySource(pixels(3, 0, (4, 6, 2)), np.zeros(3, np.int32)),
                  data.test, (4, 6, 2), 0, ())  # fmt: skip
    with pytest.raises(UserError, match="images of 2 channels have no files"):
        read_samples(tmp_path, two)


def test_a_place_is_checked_before_samples_are_drawn(tmp_path):
    check_place(tmp_path / "x.npz", 2)
    check_place(tmp_path / "new", 3)
    with pytest.raises(UserError, match=r"no PNG has 2 channels: write .*new\.npz"):
        check_place(tmp_path / "new", 2)
    (tmp_path / "0.png").touch()
    with pytest.raises(UserError, match="has files already"):
        check_place(tmp_path, 3)


def test_the_training_images_themselves_have_distance_0(data, tmp_path):
    """The same features have the same mean and covariance; and the page says whose samples."""
    train = data.train.gather(np.arange(24))["image"]
    np.savez(tmp_path / "theirs.npz", arr_0=train, arr_1=np.arange(24) % 2)
    extractors = [pixel_features(2), pixel_features(1)]
    result = measure_samples(tmp_path / "theirs.npz", data, extractors, tmp_path / "out")
    assert result == read_json(tmp_path / "out" / "evaluation.json")
    assert abs(result["frechet_distance"]["value"]) < 1e-6
    assert result["samples"]["file"] == str(tmp_path / "theirs.npz")
    assert "sampling" not in result
    assert result["by_nfe"] == []
    assert list(result["extractors"]) == ["pixels:1x1"]
    json.dumps(result, allow_nan=False)
    page = write_report(tmp_path / "out").read_text()
    assert "Measured on 24 samples of other code: file" in page.replace("\u00a0", " ")
    assert result["samples"]["sha256"] in page
    assert "experiments.train" not in page
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="out has a run, whose evaluation would be lost"):
        measure_samples(tmp_path / "theirs.npz", data, extractors, tmp_path / "out")
