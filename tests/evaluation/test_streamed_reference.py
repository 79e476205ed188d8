"""Real images are read batch by batch: memory does not depend on how many there are."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats

from diffjax.data import ArraySource, DataSet, Source, all_images
from diffjax.evaluation import image_statistics
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.evaluation.image_statistics import ImageSet
from diffjax.evaluation.metrics import compare, reference
from diffjax.evaluation.scores.copying import clustered_rows, data_copying, inauthentic
from diffjax.evaluation.scores.neighbours import nearest_neighbours

SHAPE = (8, 8, 3)


class Made(Source):
    """Images that are made when they are read, as a folder's are decoded."""

    def __init__(self, num_images, first=0):
        self.num_images, self.first = num_images, first

    def __len__(self):
        return self.num_images

    def __getitem__(self, index):
        batch = self.gather([index])
        return {"image": batch["image"][0], "label": int(batch["label"][0])}

    def gather(self, rows):
        rows = np.asarray(rows) + self.first
        pixels = (rows[:, None] * 2654435761 + np.arange(np.prod(SHAPE)) * 40503) >> 7
        images = (pixels % 251).astype(np.uint8).reshape(-1, *SHAPE)
        return {"image": images, "label": (rows % 3 == 0).astype(np.int32)}

    def fingerprint(self):
        return f"{self.num_images} from {self.first}"


def made(num_train, num_test):
    return DataSet("made", Made(num_train), Made(num_test, 10**6), SHAPE, 2, ("some", "third"))


def images_of(source, most=60_000):
    return ImageSet.in_source(source, SHAPE, most)


def peak_bytes(num_train, num_test):
    """Of looking at the data set and of all numbers of 100 samples."""
    samples = all_images(Made(100, 2 * 10**6))[0]
    tracemalloc.start()
    try:
        real = reference(made(num_train, num_test), pixel_features(2))
        assert real.train_statistics.n == num_train
        compare(samples, None, real)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.thorough
def test_peak_memory_does_not_depend_on_how_many_real_images_there_are():
    """Twice as many and more are 6 MB more in float32; their features are kept, of 12 numbers."""
    few = peak_bytes(5_000, 1_000)  # as many as k-means takes
    many = peak_bytes(12_000, 2_200)
    more = (7_000 + 1_200) * 4 * np.prod(SHAPE)
    kept = (5_000 + 1_200) * 4 * 12  # of at most 10,000 train images
    assert more > 6e6
    assert many - few < 3 * kept + 1e6


def test_the_pieces_of_images_are_those_of_all_at_once():
    source = Made(2_300)
    whole, labels = all_images(source, 2_100)
    found = images_of(source, 2_100)
    batches = list(found.batches().batches)
    assert [len(batch) for batch in batches] == [1024, 1024, 52]
    np.testing.assert_array_equal(np.concatenate(batches), whole)
    np.testing.assert_array_equal(found.take(np.array([7, 2_099, 0])), whole[[7, 2_099, 0]])
    assert found.take(np.arange(0)).shape == (0, *SHAPE)
    real = reference(made(2_300, 50), pixel_features(2), max_images=2_100)
    assert real.class_counts.tolist() == np.bincount(labels).tolist()


def test_a_streamed_reference_has_the_moments_of_all_images():
    real = reference(made(2_300, 700), pixel_features(2))
    features = pixel_features(2).features(all_images(Made(2_300))[0]).astype(np.float64)
    np.testing.assert_allclose(real.train_statistics.mean, features.mean(0), rtol=1e-10, atol=1e-12)
    expected = np.cov(features, rowvar=False)
    np.testing.assert_allclose(real.train_statistics.cov, expected, rtol=1e-9, atol=1e-12)
    test_images = all_images(Made(700, 10**6))[0]
    np.testing.assert_array_equal(real.test_features, pixel_features(2).features(test_images))
    indices, distances = real.test_neighbours
    between = scipy.spatial.distance.cdist(
        test_images.reshape(700, -1), all_images(Made(2_300))[0].reshape(2_300, -1)
    )
    np.testing.assert_allclose(distances, np.sort(between)[:, :2], rtol=1e-5)
    np.testing.assert_allclose(
        np.take_along_axis(between, indices, 1), np.sort(between)[:, :2], rtol=1e-5
    )


@pytest.mark.parametrize(("num", "k"), [(2_100, 3), (1_025, 2), (5, 5)])
def test_the_nearest_of_several_batches_are_those_of_a_search_among_all(num, k):
    rng = np.random.default_rng(num)
    references, samples = rng.normal(size=(num, 6)), rng.normal(size=(40, 6))
    samples[0] = references[-1]  # a copy of the last, alone in a batch of its own where num is 1025
    indices, distances = nearest_neighbours(samples, references, k=k, batch_size_images=16)
    between = scipy.spatial.distance.cdist(samples, references)
    np.testing.assert_array_equal(indices, np.argsort(between, axis=1)[:, :k])
    np.testing.assert_allclose(distances, np.sort(between, axis=1)[:, :k], rtol=1e-5, atol=1e-6)
    assert (indices[0, 0], distances[0, 0]) == (num - 1, 0.0)


def test_copies_are_looked_for_in_all_batches():
    """In one cell, C_T is SciPy's Mann-Whitney statistic of distances to the nearest of all."""
    rng = np.random.default_rng(0)
    train, test, samples = (rng.normal(size=(n, 4)) for n in (2_500, 60, 50))
    samples[:25] = train[-25:] + 1e-3
    ours, fresh = (scipy.spatial.distance.cdist(x, train).min(1) for x in (samples, test))
    u = scipy.stats.mannwhitneyu(ours, fresh).statistic
    expected = (u - 50 * 60 / 2) / np.sqrt(50 * 60 * (50 + 60 + 1) / 12)
    found = data_copying(samples, train, test, num_cells=1)
    assert found.value == pytest.approx(expected)
    assert found.tested_share == 1.0
    # As many batches as there are cells and more: each training image counts in its own cell.
    in_cells = data_copying(samples, train, test, num_cells=3)
    small = replace(ImageSet.of(train))
    assert data_copying(samples, small, test, num_cells=3) == in_cells
    indices, distances = nearest_neighbours(samples, train, k=2)
    apart = np.sort(scipy.spatial.distance.cdist(train[indices[:, 0]], train), axis=1)[:, 1]
    assert inauthentic(indices, distances, train) == np.mean(distances[:, 0] < apart)


def test_large_images_are_read_in_smaller_batches():
    """1024 of 256×256×3 are 805 MB of float32."""
    assert image_statistics.read_at_once((256, 256, 3)) * 256 * 256 * 3 * 4 <= 2**28
    assert image_statistics.read_at_once((64, 64, 3)) == 1024
    assert image_statistics.read_at_once((2048, 2048, 3)) == 256
    clustered = clustered_rows((60_000, 256, 256, 3))
    assert 0.9 * 2**30 < len(clustered) * 256 * 256 * 3 * 8 <= 2**30
    np.testing.assert_array_equal(clustered_rows((12_000, 64, 64, 3)), np.arange(0, 12_000, 3))
    np.testing.assert_array_equal(clustered_rows((3, 8, 8, 1)), [0, 1, 2])


def test_an_empty_test_split_is_read_as_none():
    source = ArraySource(np.zeros((0, *SHAPE), np.uint8), np.zeros(0, np.int32))
    real = reference(replace(made(40, 0), test=source), pixel_features(2))
    assert real.some_test_images.shape == (0, *SHAPE)
    assert real.inauthentic_floor is None
