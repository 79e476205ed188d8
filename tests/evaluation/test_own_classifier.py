"""A classifier of one's own classes: trained by one command, found by the data that it is for."""

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from diffjax.data import ArraySource, DataSet, image_folder, latents
from diffjax.errors import UserError
from diffjax.evaluation.extractors import classifier
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.evaluation.extractors.own_classifier import file_for, own_classifier
from diffjax.runs.measuring.measure import own_extractor, own_extractors
from diffjax.spec import spec
from experiments import train, train_classifier
from experiments.flags import cli


@pytest.fixture
def config(tmp_path) -> ConfigDict:
    """Of ten dark and ten light pictures of 8×8."""
    for name, grey in (("dark", 20), ("light", 230)):
        (tmp_path / "shades" / name).mkdir(parents=True)
        for i in range(10):
            image = Image.new("L", (8, 8), grey + i)
            image.save(tmp_path / "shades" / name / f"{i}.png")
    extractor = spec(own_classifier, cache=str(tmp_path / "cache"))
    evaluation = {"extractor": extractor, "extractors": (), "num_samples": 100}
    data = spec(image_folder, path=str(tmp_path / "shades"), image_size=8)
    return ConfigDict({"data": data, "augment": {}, "evaluation": evaluation})


@pytest.fixture
def without_training(monkeypatch):
    """The untrained network in the place of a trained one."""

    def fit(images, labels, recipe, num_classes, seed):
        network = classifier.Classifier(
            num_classes, recipe.widths, recipe.patches, recipe.num_features
        )
        return network, jax.jit(network.init)(jax.random.key(seed), images[:1])["params"]

    monkeypatch.setattr(train_classifier, "fit", fit)


def data_of(config: ConfigDict, **how: Any) -> DataSet:
    return image_folder(config.data.path, 8, **how)


def arguments(config: Any, **given: Any) -> SimpleNamespace:
    there = {"config": config, "config_name": "image_folder", "path": "", "out": "", "seed": 0}
    return SimpleNamespace(**{**there, "dataset": "digits", **given})


def test_evaluations_use_the_classifier_from_then_on(config, without_training, capsys):
    data = data_of(config)
    before = own_extractor(config, data)
    assert (before.name, before.test_accuracy) == ("pixels:8x8", None)
    assert "experiments.train_classifier" in train.describe_metrics(config, data)
    train_classifier.main(arguments(config))
    file = file_for(data, config.evaluation.extractor.cache)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert f"sha256 {sha256}" in capsys.readouterr().out
    found = own_extractor(config, data)
    assert (found.name, found.sha256) == ("classifier:own:shades", sha256)
    assert (found.image_shape, own_extractors(config, data)[0].sha256) == ((8, 8, 3), sha256)
    known = classifier.load(str(file))
    assert found.test_accuracy == known.test_accuracy
    assert known.metadata["train_sha256"] == data.train.fingerprint()
    said = train.describe_metrics(config, data)
    assert f"classifier:own:shades (sha256 {sha256[:12]}, accuracy" in said
    assert "train_classifier" not in said


def test_other_pictures_another_split_and_another_size_have_no_classifier(config):
    cache = config.evaluation.extractor.cache
    data = data_of(config)
    file = file_for(data, cache)
    assert file.parent == Path(cache)
    others = [data_of(config, split_seed=1), data_of(config, channels=1)]
    others.append(replace(data, label_names=("a", "b")))
    assert len({file, *(file_for(other, cache) for other in others)}) == 4
    # In buckets the squares are the reference, so it is the same classifier.
    assert file_for(data_of(config, buckets=4), cache) == file
    images = ArraySource(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int32))
    plain = DataSet("plain", images, images, (8, 8, 3), 0, ())
    assert own_extractor(config, plain).name == "pixels:8x8"


def test_an_extractor_that_depends_on_no_data_is_itself(config):
    pixels = pixel_features(4)
    assert pixels.of(data_of(config)) is pixels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_fraction": 0.0}, "shades has no test images, on which accuracy is measured"),
        ({"path": "dark"}, "dark has no classes: a classifier needs classes"),
    ],
)
def test_data_without_classes_or_test_images_are_refused(config, change, message):
    path = Path(config.data.path)
    config.data.update({**change, "path": str(path / change.get("path", ""))})
    with pytest.raises(UserError, match=message):
        train_classifier.wanted(arguments(config))


def test_latents_are_refused(config, tmp_path):
    np.save(tmp_path / "latents.npy", np.zeros((20, 2, 2, 4), np.float32))
    np.save(tmp_path / "labels.npy", np.repeat([0, 1], 10))
    config.data = spec(latents, path=str(tmp_path), num_classes=2)
    with pytest.raises(UserError, match="are latents: name the config of their images"):
        train_classifier.wanted(arguments(config))


def test_without_a_config_it_is_a_shipped_recipe():
    dataset, recipe, out, command = train_classifier.wanted(arguments(""))
    assert (dataset.name, recipe, str(out)) == (
        "digits", train_classifier.RECIPES["digits"], "digits.npz",
    )  # fmt: skip
    assert command.endswith("--dataset=digits --seed=0")
    with pytest.raises(UserError, match=r"no recipe for the data set 'digit'.*or set --config"):
        train_classifier.wanted(arguments("", dataset="digit"))


@pytest.mark.parametrize(("side", "num_images"), [(8, 3), (13, 900), (64, 270), (300, 10**6)])
def test_a_recipe_of_any_size_ends_in_small_maps(side, num_images):
    recipe = train_classifier.own_recipe((side, side, 3), num_images, flip=False)
    assert 4 <= -(-side // int(np.prod(recipe.patches))) <= 6
    assert len(recipe.widths) == len(recipe.patches)
    assert recipe.batch_size_images <= num_images
    assert recipe.num_epochs * num_images >= train_classifier.IMAGES_SEEN


def test_an_unknown_config_of_the_command_ends_in_one_line(capsys):
    argv = ["--config=configs/nothing.py"]
    program = train_classifier
    assert cli.run(program.main, program.FLAGS, usage="", argv=argv) == 2
    assert "there is no config file configs/nothing.py" in capsys.readouterr().err
    assert cli.run(program.main, program.FLAGS, usage="", argv=["--dataset=x"]) == 2
    assert "no recipe for the data set 'x'" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_trained_classifier_tells_dark_from_light(config, monkeypatch):
    monkeypatch.setattr(train_classifier, "IMAGES_SEEN", 2_000)
    train_classifier.main(arguments(config))
    assert own_extractor(config, data_of(config)).test_accuracy == 1.0
