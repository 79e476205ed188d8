"""Few images for testing, or none: what they can't give is null, and all else is as with many."""

import json

import jax
import numpy as np
import pytest

from diffjax.data.sources import ArraySource, DataSet
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import pixel_features, pretrained, with_params
from diffjax.evaluation.metrics import compare, reference
from diffjax.evaluation.scores.copying import data_copying


def source_of(num_images: int, seed: int) -> ArraySource:
    images = np.random.default_rng(seed).integers(0, 256, (num_images, 4, 4, 1), np.uint8)
    return ArraySource(images, np.zeros(num_images, np.int32))


def data_of(num_train: int, num_test: int) -> DataSet:
    return DataSet("few", source_of(num_train, 0), source_of(num_test, 1), (4, 4, 1), 0, ())


def numbers(num_test: int) -> dict:
    samples = np.random.default_rng(2).uniform(-1, 1, (24, 4, 4, 1)).astype(np.float32)
    return compare(samples, None, reference(data_of(24, num_test), pixel_features(2)))


def test_what_few_test_images_cannot_give_is_null_and_the_rest_as_with_many():
    many = numbers(24)
    # Fewest test images that a floor needs: for mean and covariance, a jackknife, one.
    needed = {"frechet_distance": 2, "kernel_distance": 3}
    of_neighbours = ("closer_than_test", "distance_ratio", "copied_floor", "inauthentic_floor")
    for num_test in (0, 1, 2, 3):
        few = numbers(num_test)
        json.dumps(few, allow_nan=False)
        for name, least in needed.items():
            assert few[name]["value"] == many[name]["value"]
            assert (few[name]["floor"] is None) == (num_test < least), (name, num_test)
        for name in ("copied", "inauthentic"):
            assert few["neighbours"][name] == many["neighbours"][name]
        for name in of_neighbours:
            assert (few["neighbours"][name] is None) == (num_test == 0)
    assert numbers(0)["neighbours"]["data_copying"] is None


def test_without_test_images_no_cell_has_any():
    images = np.random.default_rng(0).normal(size=(60, 3))
    assert data_copying(images, images, images[:0]) == (None, 0.0)


def test_two_training_images_are_too_few():
    with pytest.raises(UserError, match="3"):
        reference(data_of(2, 5), pixel_features(2))


def test_an_extractor_that_was_traced_is_as_good_as_before():
    """What is checked before training takes shapes alone; parameters are not part of the trace."""
    look = jax.jit(lambda params, images: (images.reshape(len(images), -1) @ params, None))
    extractor = pretrained("sums", with_params(look, np.ones((16, 2), np.float32)), 8, of="pixels")
    image = np.ones((1, 4, 4, 1), np.float32)
    features, _ = jax.eval_shape(extractor.apply, extractor.prepare(image))
    assert features.shape == (1, 2)
    assert extractor.features(image).tolist() == [[16.0, 16.0]]
