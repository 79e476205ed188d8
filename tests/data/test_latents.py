"""Latents from disk, what a config expects of its data, and the configs for TPUs and GPUs."""

import re

import numpy as np
import pytest

from diffjax import config_files
from diffjax.conditions import of_classes
from diffjax.data import all_images, batches, latents
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.evaluation.metrics import compare, reference
from diffjax.runs.checks import check_expected, check_pairs
from diffjax.runs.setup import set_up


@pytest.fixture
def latent_arrays():
    random = np.random.default_rng(0)
    return {
        "latents": random.standard_normal((40, 4, 4, 2)).astype(np.float16),
        "labels": np.arange(40) % 4,
    }


def latent_folder(folder, arrays):
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return str(folder)


def test_latents_of_a_folder_and_of_an_archive_are_the_arrays(tmp_path, latent_arrays):
    folder = latent_folder(tmp_path, latent_arrays)
    np.savez(tmp_path / "both.npz", **latent_arrays)
    for path in (folder, str(tmp_path / "both.npz")):
        data = latents(path, num_classes=4, scale=0.5, test_fraction=0.1)
        assert (data.image_shape, data.num_classes) == ((4, 4, 2), 4)
        assert (len(data.train), len(data.test)) == (36, 4)
        every = [source.gather(np.arange(len(source))) for source in (data.train, data.test)]
        images = np.concatenate([batch["image"] for batch in every])
        labels = np.concatenate([batch["label"] for batch in every])
        order = [int(np.flatnonzero((latent_arrays["latents"] == image / 0.5).all((1, 2, 3)))[0])
                 for image in images]  # fmt: skip
        assert sorted(order) == list(range(40))
        np.testing.assert_array_equal(labels, latent_arrays["labels"][order])
        assert images.dtype == np.float32


def test_latents_reach_training_unscaled_and_are_mapped(tmp_path, latent_arrays):
    data = latents(latent_folder(tmp_path, latent_arrays), num_classes=4)
    assert isinstance(data.train.latents, np.memmap)  # type: ignore[attr-defined]
    batch = next(iter(batches(data.train, batch_size=8, seed=0)))
    assert np.abs(batch["image"]).max() > 1.5


def test_other_latents_have_another_fingerprint(tmp_path, latent_arrays):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = latents(latent_folder(tmp_path / "a", latent_arrays), num_classes=4)
    again = latents(str(tmp_path / "a"), num_classes=4)
    latent_arrays["labels"] = latent_arrays["labels"][::-1].copy()
    other = latents(latent_folder(tmp_path / "b", latent_arrays), num_classes=4)
    scaled = latents(str(tmp_path / "a"), num_classes=4, scale=2.0)
    prints = [data.train.fingerprint() for data in (one, again, other, scaled)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_latents_encoded_anew_have_another_fingerprint(tmp_path, latent_arrays):
    """At equal size, shape and type."""

    def found(path):
        return latents(path, num_classes=4).train.fingerprint()

    folder = latent_folder(tmp_path, latent_arrays)
    (tmp_path / "copy").mkdir()
    before = found(folder)
    assert found(latent_folder(tmp_path / "copy", latent_arrays)) == before
    latent_arrays["latents"] += np.float16(1.0)
    assert found(latent_folder(tmp_path, latent_arrays)) != before


@pytest.mark.thorough(tenth=False)
def test_a_reference_is_made_anew_of_latents_that_changed(tmp_path, latent_arrays):
    """Also where the fingerprint does not see it: of 2,000 latents it looks into 256 a split."""
    arrays = {name: np.concatenate([array] * 50) for name, array in latent_arrays.items()}
    means, prints = [], []
    for row in (None, 7):
        if row is not None:
            arrays["latents"][row] += np.float16(100.0)
        data = latents(latent_folder(tmp_path, arrays), num_classes=4)
        made = reference(data, pixel_features(size=2), folder=str(tmp_path / "kept"))
        again = reference(data, pixel_features(size=2), folder=str(tmp_path / "kept"))
        np.testing.assert_array_equal(made.train_statistics.mean, again.train_statistics.mean)
        expected = reference(data, pixel_features(size=2), folder=None).train_statistics.mean
        np.testing.assert_allclose(made.train_statistics.mean, expected, rtol=1e-6)
        means.append(expected)
        prints.append(data.train.fingerprint())
    assert prints[0] == prints[1]
    assert np.abs(means[0] - means[1]).max() > 0.01
    assert len(list((tmp_path / "kept").iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latents": np.zeros((4, 4, 2), np.float32)}, "float16 or float32 [N,H,W,C]"),
        ({"latents": np.zeros((40, 4, 4, 2), np.uint8)}, "uint8"),
        ({"labels": np.zeros(3, np.int64)}, "labels of 40 latents"),
        ({"labels": np.full(40, 9)}, "num_classes"),
    ],
)
def test_what_is_no_latents_is_refused(change, words, tmp_path, latent_arrays):
    with pytest.raises(UserError, match=re.escape(words)):
        latents(latent_folder(tmp_path, latent_arrays | change), num_classes=4)


def test_missing_latents_say_what_is_needed(tmp_path):
    with pytest.raises(UserError, match=r"config\.data\.path"):
        latents()
    with pytest.raises(UserError, match=r"latents\.npy"):
        latents(str(tmp_path))


def test_a_latent_that_is_not_finite_is_named(tmp_path, latent_arrays):
    latent_arrays["latents"][7, 0, 0, 0] = np.inf
    data = latents(latent_folder(tmp_path, latent_arrays), num_classes=4)

    def read_all():
        return [source.gather(np.arange(len(source))) for source in (data.train, data.test)]

    with pytest.raises(UserError, match="latent 7 "):
        read_all()


def test_train_latents_as_samples_have_distance_0_and_it_is_said_how(tmp_path, latent_arrays):
    """They reach far beyond [-1, 1], and lie on no levels of 8 bits."""
    latent_arrays["latents"] = latent_arrays["latents"] * np.float16(3.0)
    path = latent_folder(tmp_path, latent_arrays)
    data = latents(path, num_classes=4, test_fraction=0.1)
    found = compare(all_images(data.train)[0], None, reference(data, pixel_features(size=2)))
    assert found["frechet_distance"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert found["neighbours"]["copied"] == 1.0
    for stated in (found["frechet_distance"]["provenance"], found["neighbours"]["provenance"]):
        assert (stated["value_range"], stated["rounding"]) == ("any", "none")
        assert stated["codec"] == "not stated"
        assert stated["reference_sha256"] == data.train.fingerprint()


def small(arguments=""):
    config = config_files.load(f"configs/imagenet256.py:{arguments or 'model=DiT-S/4'}")
    config.model.update(hidden_size=16, depth=1, num_heads=2)
    config.expected.update(image_shape=(4, 4, 2), num_classes=4, num_images=40)
    return config


def test_data_that_a_config_expects_are_taken(tmp_path, latent_arrays):
    config = small()
    data = latents(latent_folder(tmp_path, latent_arrays), num_classes=4)
    check_expected(config, data)
    config.expected.num_images = len(data.train)
    check_expected(config, data)
    check_pairs(set_up(config, data.image_shape, data.condition).parts, data)


@pytest.mark.parametrize(
    ("name", "other"), [("image_shape", (8, 8, 2)), ("num_classes", 3), ("num_images", 41)]
)
def test_data_that_differ_are_refused_in_one_line(tmp_path, latent_arrays, name, other):
    config = small()
    config.expected[name] = other
    data = latents(latent_folder(tmp_path, latent_arrays), num_classes=4)
    with pytest.raises(UserError, match=rf"{name}=.*--config\.expected\.{name}"):
        check_expected(config, data)


def test_lists_of_a_saved_config_are_the_same_as_tuples(tmp_path, latent_arrays):
    config = small()
    config.expected = {"image_shape": [4, 4, 2]}
    check_expected(config, latents(latent_folder(tmp_path, latent_arrays), num_classes=7))


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        ("flow", "imagenet256"),
        pytest.param("edm", "imagenet64", marks=pytest.mark.thorough(tenth=False)),
        ("edm", "cifar10"),
        pytest.param("edm", "imagenet256", marks=pytest.mark.thorough(tenth=False)),
        pytest.param("flow", "imagenet64", marks=pytest.mark.thorough(tenth=False)),
        pytest.param("flow", "cifar10", marks=pytest.mark.thorough(tenth=False)),
    ],
)
def test_configs_of_data_that_are_not_at_hand_fit_together(name, objective):
    config = config_files.load(f"configs/{name}.py:objective={objective},model=DiT-S/8")
    config.model.depth = 1
    expected = config.get("expected", {"image_shape": (32, 32, 3), "num_classes": 10})
    setup = set_up(config, tuple(expected["image_shape"]), of_classes(expected["num_classes"]))
    assert setup.wired.num_params > 1e5


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("DiT-S/2", 33e6),
        pytest.param("DiT-B/2", 130e6, marks=pytest.mark.thorough),
        pytest.param("DiT-XL/2", 675e6, marks=pytest.mark.thorough),
    ],
)
def test_the_models_have_the_published_numbers_of_parameters(size, parameters):
    config = config_files.load(f"configs/imagenet256.py:model={size}")
    setup = set_up(config, config.expected.image_shape, of_classes(config.expected.num_classes))
    assert setup.wired.num_params == pytest.approx(parameters, rel=0.02)
