"""Metrics against closed forms, brute force and independent code."""

import io
import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from sklearn.neighbors import NearestNeighbors

from diffjax.data import DataSet, all_images, colours, digits, fashion_mnist
from diffjax.errors import UserError
from diffjax.evaluation.extractors import classifier
from diffjax.evaluation.extractors.features import classifier_features, pixel_features
from diffjax.evaluation.image_statistics import Batches
from diffjax.evaluation.intervals import wilson_interval
from diffjax.evaluation.metrics import (
    Reference,
    compare,
    compare_each,
    reference,
    thin,
)
from diffjax.evaluation.scores.distances import frechet_distance, kernel_distance, statistics
from diffjax.evaluation.scores.neighbours import memorisation, nearest_neighbours
from experiments import train_classifier
from tests.support.compilations import compilations


def gaussian(seed: int, width: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """A random mean and covariance."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(width, width))
    return rng.normal(size=width), factor @ factor.T


def rotation(seed: int, width: int = 6) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]


class TestFrechet:
    def test_commuting_covariances_have_a_closed_form(self):
        q, rng = rotation(0), np.random.default_rng(1)
        roots_1, roots_2 = rng.uniform(0, 2, (2, 6))
        mean_1, mean_2 = rng.normal(size=(2, 6))
        found = frechet_distance(mean_1, (q * roots_1**2) @ q.T, mean_2, (q * roots_2**2) @ q.T)
        exact = np.sum((mean_1 - mean_2) ** 2) + np.sum((roots_1 - roots_2) ** 2)
        assert found == pytest.approx(exact, rel=1e-10)

    @pytest.mark.parametrize("seed", range(3))
    def test_equals_the_formula_with_a_matrix_square_root(self, seed):
        (mean_1, cov_1), (mean_2, cov_2) = gaussian(seed), gaussian(seed + 10)
        root = np.real(scipy.linalg.sqrtm(cov_1 @ cov_2))
        exact = np.sum((mean_1 - mean_2) ** 2) + np.trace(cov_1 + cov_2 - 2 * root)
        assert frechet_distance(mean_1, cov_1, mean_2, cov_2) == pytest.approx(exact, rel=1e-8)

    def test_singular_covariances_have_a_closed_form(self):
        # Two lines at 60 degrees with unit variance along each: tr (C1^½ C2 C1^½)^½ = cos 60.
        u, v = np.array([1.0, 0.0]), np.array([0.5, np.sqrt(0.75)])
        zero = np.zeros(2)
        found = frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v))
        assert found == pytest.approx(1 + 1 - 2 * 0.5)

    def test_is_symmetric_and_zero_for_equal(self):
        one, two = gaussian(0), gaussian(1)
        assert frechet_distance(*one, *two) == pytest.approx(frechet_distance(*two, *one))
        assert frechet_distance(*one, *one) == pytest.approx(0.0, abs=1e-10)

    def test_does_not_change_under_rotation_and_scales_as_a_square(self):
        (mean_1, cov_1), (mean_2, cov_2), q = gaussian(0), gaussian(1), 3.0 * rotation(2)
        before = frechet_distance(mean_1, cov_1, mean_2, cov_2)
        after = frechet_distance(q @ mean_1, q @ cov_1 @ q.T, q @ mean_2, q @ cov_2 @ q.T)
        assert after == pytest.approx(9.0 * before)

    def test_of_samples_approaches_that_of_their_gaussians(self):
        (mean_1, cov_1), (mean_2, cov_2), rng = gaussian(0), gaussian(1), np.random.default_rng(2)
        one = statistics(rng.multivariate_normal(mean_1, cov_1, 40_000))
        two = statistics(rng.multivariate_normal(mean_2, cov_2, 40_000))
        exact = frechet_distance(mean_1, cov_1, mean_2, cov_2)
        found = frechet_distance(one.mean, one.cov, two.mean, two.cov)
        assert found == pytest.approx(exact, rel=0.02)

    def test_mismatched_or_non_finite_statistics_are_refused(self):
        with pytest.raises(UserError, match=r"^Fréchet distance of shapes \[\(2,\), \(2, 2\), "):
            frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
        with pytest.raises(UserError, match=r"^Fréchet distance of statistics that are not"):
            frechet_distance(np.zeros(2), np.eye(2), np.array([0.0, np.inf]), np.eye(2))


class TestStatistics:
    def test_are_mean_and_unbiased_covariance(self):
        x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
        mean, cov, n = statistics(x)
        centred = x.astype(np.float64) - x.astype(np.float64).sum(0) / 7
        assert n == 7
        assert mean.dtype == cov.dtype == np.float64
        np.testing.assert_allclose(mean, x.astype(np.float64).sum(0) / 7)
        np.testing.assert_allclose(cov, centred.T @ centred / 6)

    def test_one_feature_is_enough(self):
        assert statistics(np.array([[1.0], [3.0]])).cov.shape == (1, 1)

    def test_bad_features_are_counted(self):
        x = np.zeros((5, 3))
        x[1, 0], x[4] = np.nan, np.inf
        with pytest.raises(UserError, match=r"^2 of 5 feature vectors are not finite"):
            statistics(x)
        with pytest.raises(UserError, match="1 images are too few"):
            statistics(x[:1])


def brute_force_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def k(a, b):
        return (float(a @ b) / len(a) + 1.0) ** 3

    m, n = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (m * n)


class TestKernelDistance:
    def test_equals_a_double_loop_and_its_error_a_jackknife_loop(self):
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(5, 3)), rng.normal(size=(7, 3)) + 0.5
        found = kernel_distance(x, y)
        assert found.value == pytest.approx(brute_force_mmd(x, y), rel=1e-12)
        without_x = [brute_force_mmd(np.delete(x, i, 0), y) for i in range(5)]
        without_y = [brute_force_mmd(x, np.delete(y, i, 0)) for i in range(7)]
        variance = 4 * np.var(without_x) + 6 * np.var(without_y)
        assert found.standard_error == pytest.approx(np.sqrt(variance), rel=1e-12)

    def test_is_unbiased_for_equal_distributions_and_its_error_is_no_smaller_than_the_truth(self):
        rng = np.random.default_rng(1)
        runs = [kernel_distance(*rng.normal(size=(2, 60, 4))) for _ in range(200)]
        values = np.array([run.value for run in runs])
        assert abs(values.mean()) < 3 * values.std() / np.sqrt(200)
        typical_error = np.sqrt(np.mean([run.standard_error**2 for run in runs]))
        assert values.std() < typical_error < 2.5 * values.std()

    def test_is_unbiased_and_calibrated_for_shifted_distributions(self):
        # k is a polynomial, so E k needs only moments: x ~ N(0, 1), y ~ N(1, 1), one feature.
        # E (xy + 1)³ for independent x, y = 1 + 3 m1 m1' + 3 m2 m2' + m3 m3'.
        def k(a, b):
            return 1 + 3 * a[0] * b[0] + 3 * a[1] * b[1] + a[2] * b[2]

        x_moments, y_moments = (0, 1, 0), (1, 2, 4)
        exact = k(x_moments, x_moments) + k(y_moments, y_moments) - 2 * k(x_moments, y_moments)
        rng = np.random.default_rng(2)
        runs = [
            kernel_distance(rng.normal(size=(300, 1)), rng.normal(size=(200, 1)) + 1)
            for _ in range(200)
        ]
        scores = np.array([(run.value - exact) / run.standard_error for run in runs])
        values = np.array([run.value for run in runs])
        assert abs(values.mean() - exact) < 3 * values.std() / np.sqrt(200)
        assert 0.75 < scores.std() < 1.35
        assert values.min() > 0

    def test_a_large_set_is_thinned_the_same_way_each_time(self):
        x, y = np.random.default_rng(3).normal(size=(2, 80, 3))
        found = kernel_distance(x, y[:20], seed=4, max_images=30)
        assert found == kernel_distance(x, y[:20], seed=4, max_images=30)
        assert found.value != kernel_distance(x, y[:20], seed=5, max_images=30).value
        assert (found.num_1, found.num_2) == (30, 20)
        assert kernel_distance(x, y, max_images=30) == kernel_distance(x, y, seed=0, max_images=30)
        assert kernel_distance(x, y, max_images=3).num_2 == 3
        assert kernel_distance(x[:3], y[:3]).value == pytest.approx(brute_force_mmd(x[:3], y[:3]))
        with pytest.raises(UserError, match=r"max_images=2\): at least 3 are needed"):
            kernel_distance(x, y, max_images=2)

    def test_a_thinned_set_repeats_no_vector(self):
        x, y = np.random.default_rng(3).normal(size=(2, 30, 3))
        found = kernel_distance(x, y, max_images=29).value
        parts = [[np.delete(both, i, 0) for i in range(30)] for both in (x, y)]
        possible = [kernel_distance(one, other).value for one in parts[0] for other in parts[1]]
        assert np.abs(np.subtract(possible, found)).min() < 1e-12

    @pytest.mark.parametrize(
        ("x", "y", "message"),
        [
            (np.zeros((2, 3)), np.zeros((5, 3)), r"^2 images are too few: at least 3 are needed$"),
            (np.zeros((5, 3)), np.zeros((2, 3)), "2 images are too few"),
            (np.zeros((5, 3)), np.zeros((5, 4)), "^features of different widths, 3 and 4$"),
            (np.zeros((5, 3)), np.full((5, 3), np.nan), "5 of 5 feature vectors"),
            (np.zeros(5), np.zeros((5, 3)), r"^features must be \[N, F\], not \[5\]$"),
        ],
    )
    def test_bad_features_are_refused(self, x, y, message):
        with pytest.raises(UserError, match=message):
            kernel_distance(x, y)


class TestNeighbours:
    @pytest.mark.parametrize("batch_size_images", [4, 7, 100])
    def test_equal_an_independent_search(self, batch_size_images):
        rng = np.random.default_rng(0)
        samples = rng.normal(size=(11, 4, 3)).astype(np.float32)
        references = rng.normal(size=(40, 4, 3)).astype(np.float32)
        indices, distances = nearest_neighbours(
            samples, references, k=5, batch_size_images=batch_size_images
        )
        search = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(references.reshape(40, -1))
        exact_distances, exact_indices = search.kneighbors(samples.reshape(11, -1))
        np.testing.assert_array_equal(indices, exact_indices)
        np.testing.assert_allclose(distances, exact_distances, rtol=1e-6)

    def test_a_copy_is_at_distance_zero_however_large_the_pixels(self):
        references = 1000 + np.random.default_rng(0).normal(size=(30, 50)).astype(np.float32)
        indices, distances = nearest_neighbours(references[7:9], references)
        assert indices.tolist() == [[7], [8]]
        assert distances.tolist() == [[0.0], [0.0]]

    def test_impossible_requests_are_refused(self):
        with pytest.raises(UserError, match="3 nearest of 2"):
            nearest_neighbours(np.zeros((1, 2)), np.zeros((2, 2)), k=3)
        with pytest.raises(UserError, match="differ in shape"):
            nearest_neighbours(np.zeros((1, 3)), np.zeros((2, 2)))
        with pytest.raises(UserError, match="1 of 2 samples are not finite"):
            nearest_neighbours(np.array([[0.0], [np.nan]]), np.zeros((2, 1)))


class TestMemorisation:
    def test_a_perfect_generator_is_as_far_from_train_as_test_is(self):
        rng = np.random.default_rng(0)
        train, test, samples = rng.normal(size=(3, 1500, 5))
        found = memorisation(
            nearest_neighbours(samples, train, k=2)[1], nearest_neighbours(test, train, k=2)[1]
        )
        # The Mann-Whitney statistic's deviation for two samples of 1500 is √(3001/12)/1500 ≈ 0.01.
        assert found.closer_than_test == pytest.approx(0.5, abs=0.04)
        assert found.distance_ratio == pytest.approx(1.0, abs=0.05)
        assert found.copied == pytest.approx(found.copied_floor, abs=0.02)

    def test_is_the_mann_whitney_statistic(self):
        rng = np.random.default_rng(1)
        samples, test = rng.integers(1, 9, 40).astype(float), rng.integers(2, 12, 30).astype(float)
        exact = scipy.stats.mannwhitneyu(test, samples).statistic / (40 * 30)
        found = memorisation(np.stack([samples, samples], 1), np.stack([test, test], 1))
        assert found.closer_than_test == pytest.approx(exact)

    def test_copies_are_seen(self):
        rng = np.random.default_rng(2)
        train, test = rng.normal(size=(2, 500, 20)).astype(np.float32)
        copies = train[:100] + 0.01 * rng.normal(size=(100, 20)).astype(np.float32)
        # Half copies, half fresh: the share shows, where a median would not.
        samples = np.concatenate([copies, rng.normal(size=(100, 20)).astype(np.float32)])
        found = memorisation(
            nearest_neighbours(samples, train, k=2)[1], nearest_neighbours(test, train, k=2)[1]
        )
        assert found.copied == 0.5
        assert found.copied_floor == 0.0
        assert found.closer_than_test > 0.7

    def test_a_copy_of_a_duplicated_image_counts(self):
        assert memorisation(np.zeros((1, 2)), np.ones((1, 2))).copied == 1.0

    def test_other_than_two_distances_are_refused(self):
        with pytest.raises(UserError, match="needs"):
            memorisation(np.zeros((3, 1)), np.zeros((3, 2)))


class TestFeatures:
    def test_whole_blocks_are_plain_means(self):
        images = np.random.default_rng(0).uniform(-1, 1, (3, 6, 4, 2)).astype(np.float32)
        found = pixel_features(size=2).features(images).reshape(3, 2, 2, 2)
        np.testing.assert_allclose(found[:, 0, 1], images[:, :3, 2:].mean((1, 2)), rtol=1e-5)

    def test_cut_pixels_count_by_their_share(self):
        image = np.array([[3.0, 6.0, 9.0]] * 3, np.float32)[None, :, :, None]
        # Halves of three pixels are 1.5 wide: (3 + 6/2) / 1.5 and (6/2 + 9) / 1.5.
        np.testing.assert_allclose(pixel_features(size=2).features(image), [[4, 8, 4, 8]])

    def test_a_row_does_not_depend_on_its_batch_and_nothing_recompiles(self):
        extractor = classifier_features("digits")
        images = np.random.default_rng(0).uniform(-1, 1, (300, 8, 8, 1)).astype(np.float32)
        features, logits = extractor.extract(images)
        assert logits is not None
        assert features.shape == (300, 64)
        assert logits.shape == (300, 10)
        with compilations() as programs:
            again = classifier_features("digits").features(images[290:])
        np.testing.assert_allclose(again, features[290:], atol=1e-5)
        assert programs == [], "nor for a second extractor of that name"

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (np.zeros((2, 28, 28, 1), np.float32), r"needs images \[N, 8, 8, 1\], not \[2, 28"),
            (np.zeros((0, 8, 8, 1), np.float32), "no images"),
            (np.zeros((2, 8, 8, 1), np.uint8), "not uint8"),
            (np.full((2, 8, 8, 1), np.nan, np.float32), "2 of 2 images"),
        ],
    )
    def test_bad_images_are_refused(self, images, message):
        with pytest.raises(UserError, match=message):
            classifier_features("digits").features(images)

    def test_too_small_an_image_is_refused(self):
        with pytest.raises(UserError, match="can't take 4x4"):
            pixel_features(size=8).features(np.zeros((1, 4, 4, 1), np.float32))

    def test_the_hash_tells_definitions_apart(self):
        digests = [pixel_features(size=size).sha256 for size in (2, 4, 8)]
        assert all(len(digest) == 64 for digest in digests)
        assert all(one != two for one, two in pairwise(digests))


def weights(name: str) -> bytes:
    return (Path(classifier.__file__).parent / f"weights/{name}.npz").read_bytes()


def shipped_accuracy(dataset: DataSet, name: str) -> float:
    images, labels = all_images(dataset.test)
    logits = classifier_features(name).extract(images)[1]
    assert logits is not None
    return float((logits.argmax(1) == labels).mean())


class TestClassifier:
    @pytest.mark.parametrize(("name", "most_bytes"), [("digits", 2e5), ("fashion_mnist", 1.5e6)])
    def test_shipped_files_are_small_and_hold_no_pickle(self, name, most_bytes):
        data = weights(name)
        assert len(data) < most_bytes
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            assert {file[key].dtype.kind for key in file.files} == {"f", "U"}

    def test_digits_are_recognised_as_stated(self):
        dataset, trained = digits(), classifier.load("digits")
        assert dataset.train.fingerprint() == trained.metadata["train_sha256"]
        assert dataset.test.fingerprint() == trained.metadata["test_sha256"]
        assert shipped_accuracy(dataset, "digits") == pytest.approx(trained.test_accuracy, abs=1e-9)
        assert trained.test_accuracy >= 0.985

    @pytest.mark.thorough
    def test_fashion_is_recognised_as_stated(self):
        folders = [
            os.environ.get("DIFFJAX_FASHION_MNIST", ""),
            Path(__file__).parents[3] / "shared/data/fashion-mnist",
        ]
        folder = next((f for f in map(Path, filter(None, folders)) if f.is_dir()), None)
        if folder is None:
            pytest.skip("Fashion-MNIST is not here; DIFFJAX_FASHION_MNIST can name its folder")
        dataset, trained = fashion_mnist(path=str(folder)), classifier.load("fashion_mnist")
        assert dataset.train.fingerprint() == trained.metadata["train_sha256"]
        found = shipped_accuracy(dataset, "fashion_mnist")
        assert found == pytest.approx(trained.test_accuracy, abs=3e-4)
        assert trained.test_accuracy >= 0.92

    def test_a_file_survives_writing_and_reading(self):
        trained = classifier.load("digits")
        metadata = {k: v for k, v in trained.metadata.items() if k != "network"}
        data = classifier.classifier_to_npz(trained.network, trained.params, metadata)
        # The shipped file's own bytes differ: Python 3.11.4 changed the headers of zip files.
        assert data == classifier.classifier_to_npz(trained.network, trained.params, metadata)
        again = classifier.decode("again", data)
        jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)
        assert again.network == trained.network
        assert again.metadata == trained.metadata

    @pytest.mark.parametrize("position", [100, 5000, -30])
    def test_a_flipped_bit_is_noticed(self, position):
        data = bytearray(weights("digits"))
        data[position] ^= 1
        with pytest.raises(UserError, match="damaged or was exchanged"):
            classifier.decode("digits", bytes(data), classifier.SHIPPED["digits"])

    @pytest.mark.parametrize(
        "data", [b"", b"no zip file", weights("digits")[:3000]], ids=["empty", "text", "cut"]
    )
    def test_another_kind_of_file_is_refused(self, data, tmp_path):
        path = tmp_path / "mine.npz"
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"mine\.npz is not a classifier"):
            classifier.load(str(path))

    def test_a_pickle_is_refused(self, tmp_path):
        path = tmp_path / "mine.npz"
        np.savez(path, metadata=np.array([{"a": 1}], dtype=object))
        with pytest.raises(UserError, match="not a classifier"):
            classifier.load(str(path))

    def test_unknown_names_get_the_nearest(self, tmp_path):
        with pytest.raises(UserError, match="did you mean 'digits'"):
            classifier.load("digit")
        with pytest.raises(UserError, match="No such file"):
            classifier.load(str(tmp_path / "none.npz"))


class TestTraining:
    @pytest.mark.thorough
    def test_rescaling_keeps_the_logits_and_brings_features_near_one(self):
        network = classifier.Classifier(10, (8, 8), (1, 2), 16)
        images = np.random.default_rng(0).uniform(-1, 1, (32, 8, 8, 1)).astype(np.float32)
        params: Any = jax.jit(network.init)(jax.random.key(0), images)["params"]
        params["Dense_2"]["kernel"] = 37.0 * params["Dense_2"]["kernel"]
        before, large = train_classifier.outputs(network, params, images)
        rescaled = train_classifier.rescale(network, params, images)
        after, features = train_classifier.outputs(network, rescaled, images)
        np.testing.assert_array_equal(before, after)
        assert np.mean(large**2) > 10
        assert 0.5 <= np.mean(features**2) <= 2

    @pytest.mark.thorough
    def test_augmented_images_differ_and_stay_in_range(self):
        recipe = train_classifier.RECIPES["fashion_mnist"]
        augment = jax.jit(train_classifier.augment, static_argnames="recipe")
        image = np.random.default_rng(0).uniform(-1, 1, (1, 28, 28, 1)).astype(np.float32)
        images = np.repeat(image, 64, 0)
        found = np.asarray(augment(jax.random.key(0), images, recipe))
        assert np.abs(found).max() <= 1.0
        assert len(np.unique(found.reshape(64, -1), axis=0)) == 64
        mirror_only = replace(
            recipe,
            max_shift_pixels=0.0,
            max_rotation_degrees=0.0,
            max_scale=0.0,
            max_noise=0.0,
            max_erased_pixels=0,
        )
        found = np.asarray(augment(jax.random.key(0), images, mirror_only))
        gap_to_same = np.abs(found - image).max((1, 2, 3))
        gap_to_mirrored = np.abs(found - image[:, :, ::-1]).max((1, 2, 3))
        assert (np.minimum(gap_to_same, gap_to_mirrored) < 1e-4).all()
        assert 10 < (gap_to_mirrored < 1e-4).sum() < 54

    @pytest.mark.thorough
    def test_erasing_paints_a_rectangle_of_one_grey_over_half_of_the_images(self):
        images = np.full((200, 28, 28, 1), 5.0, np.float32)
        found = np.asarray(train_classifier.erase(jax.random.key(0), images, 12))[..., 0]
        erased = found != 5.0
        rows, columns = erased.any(2).sum(1), erased.any(1).sum(1)
        np.testing.assert_array_equal(erased.sum((1, 2)), rows * columns)
        assert max(rows.max(), columns.max()) <= 12
        assert 70 < (rows > 0).sum() < 130
        greys = [np.unique(image[where]) for image, where in zip(found, erased, strict=True)]
        assert all(len(grey) <= 1 and (np.abs(grey) <= 1).all() for grey in greys)

    @pytest.mark.thorough
    def test_the_script_writes_what_evaluation_reads(self, tmp_path, monkeypatch, capsys):
        recipe = train_classifier.RECIPES["digits"]
        tiny = replace(recipe, widths=(8, 16), num_epochs=4)
        monkeypatch.setitem(train_classifier.RECIPES, "digits", tiny)
        out = tmp_path / "mine.npz"
        args = SimpleNamespace(config="", dataset="digits", path="", out=str(out), seed=1)
        train_classifier.main(args)
        trained = classifier.load(str(out))
        assert trained.sha256 in capsys.readouterr().out
        assert trained.test_accuracy > 0.5
        extractor = classifier_features(str(out))
        assert extractor.sha256 == trained.sha256
        assert shipped_accuracy(digits(), str(out)) == pytest.approx(trained.test_accuracy)


@pytest.fixture(scope="module")
def digits_reference() -> Reference:
    return reference(digits(), classifier_features("digits"))


@pytest.fixture(scope="module")
def real() -> tuple[np.ndarray, np.ndarray]:
    """All test digits and their labels."""
    return all_images(digits().test)


@pytest.fixture(scope="module")
def of_the_test_split(digits_reference, real):
    return compare(*real, digits_reference)


class TestCompare:
    def test_the_test_split_scores_its_own_floor(self, of_the_test_split):
        dataset, found = digits(), of_the_test_split
        assert found["cmmd"] is None  # its features are not for it
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        for distance in (found["frechet_distance"], found["kernel_distance"]):
            assert distance["value"] == pytest.approx(distance["floor"], rel=1e-6)
            counts = distance["provenance"]
            assert counts["num_samples"] == counts["num_floor_images"] == len(dataset.test)
            assert counts["num_reference_images"] == len(dataset.train)
            assert counts["reference"] == "digits/train"
            assert counts["rounding"] == "uint8"
            assert counts["reference_sha256"] == dataset.train.fingerprint()
            assert counts["extractor_sha256"] == classifier.SHIPPED["digits"]
        assert found["accuracy"] == pytest.approx(found["classifier_test_accuracy"])
        assert found["neighbours"]["closer_than_test"] == pytest.approx(0.5)
        plain = found["frechet_distance"]["provenance"]
        assert (
            found["accuracy_provenance"].items()
            >= {
                key: plain[key] for key in ("extractor_sha256", "reference_sha256", "num_samples")
            }.items()
        )
        near = found["neighbours"]["provenance"]
        assert near["reference_sha256"] == dataset.train.fingerprint()
        assert near["test_sha256"] == dataset.test.fingerprint()
        assert (plain["codec"], plain["resize"]) == ("none", "none")

    @pytest.mark.thorough
    def test_worse_samples_are_further_away(self, digits_reference, real):
        rng, images = np.random.default_rng(0), real[0]
        levels = [0.0, 0.3, 0.6, 1.2]
        found = [
            compare(images + level * rng.normal(size=images.shape), None, digits_reference)
            for level in levels
        ]
        for name in ("frechet_distance", "kernel_distance"):
            values = [metrics[name]["value"] for metrics in found]
            assert values == sorted(values)
            assert values[-1] > values[0] + 0.1

    def test_the_frechet_floor_uses_as_many_images_as_there_are_samples(
        self, digits_reference, real, of_the_test_split
    ):
        # Fresh real images, a different part of the test split than the floor's, are no worse.
        found = compare(real[0][::4], None, digits_reference)["frechet_distance"]
        assert found["provenance"]["num_samples"] == found["provenance"]["num_floor_images"] == 90
        assert found["value"] == pytest.approx(found["floor"], rel=0.25)
        whole = of_the_test_split["frechet_distance"]
        assert whole["floor"] < 0.7 * found["floor"]

    @pytest.mark.thorough
    def test_a_missing_class_shows_although_each_sample_is_real(self, digits_reference, real):
        images, labels = real
        found = compare(images[labels < 5], labels[labels < 5], digits_reference)
        assert found["accuracy"] > 0.98
        assert found["frechet_distance"]["value"] > 8 * found["frechet_distance"]["floor"]

    def test_training_images_are_caught(self, digits_reference):
        images = digits_reference.train_images.take(np.arange(200))
        found = compare(images, None, digits_reference)["neighbours"]
        assert (found["copied"], found["closer_than_test"], found["distance_ratio"]) == (1, 1, 0)
        assert found["inauthentic"] == 1
        assert 0.3 < found["inauthentic_floor"] < 0.7
        assert found["data_copying"] < -3

    @pytest.mark.thorough
    def test_fidelity_and_variety_fall_apart(self, digits_reference, real):
        images, labels = real
        half = compare(images[labels < 5], None, digits_reference)
        assert half["precision"]["value"] > half["precision"]["floor"] - 0.05
        for name in ("recall", "coverage"):
            assert half[name]["value"] == pytest.approx(0.5, abs=0.1)
            assert half[name]["floor"] > 0.9
        noise = np.random.default_rng(0).normal(size=images.shape)
        noisy = compare(images + 0.8 * noise, None, digits_reference)
        assert noisy["precision"]["value"] < noisy["precision"]["floor"] - 0.2
        assert noisy["density"]["value"] < half["density"]["value"] - 0.2

    def test_numbers_in_depth_say_what_they_were_measured_with(self, digits_reference):
        # Enough for the extrapolation, which takes about 13 samples a feature.
        images = digits_reference.train_images.take(np.arange(900))
        found = compare(images, None, digits_reference)
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        plain = found["frechet_distance"]
        whole = plain["provenance"]
        infinite = found["frechet_distance_at_infinity"]
        assert infinite["value"] < plain["value"]
        assert infinite["floor"] is None
        for name, stated in {
            "frechet_distance_at_infinity": {"sizes_of_parts": [900, 450, 225]},
            "precision": {"k": 5},
            "coverage": {"k": 5, "num_reference_images": 900},
            "inception_score": {"num_splits": 10, "num_reference_images": 0},
        }.items():
            provenance = found[name]["provenance"]
            assert provenance["definition"].startswith("arXiv:")
            assert {key: provenance[key] for key in stated} == stated
            for key in ("extractor_sha256", "reference_sha256", "num_samples", "seed"):
                assert provenance[key] == whole[key]
        assert 8 < found["inception_score"]["value"] < 10

    @pytest.mark.thorough(tenth=False)
    def test_what_few_samples_or_no_classes_do_not_give_is_none(self, digits_reference, real):
        few = compare(real[0][:5], None, digits_reference)
        for name in ("frechet_distance_at_infinity", "precision", "coverage", "inception_score"):
            assert few[name] is None
        assert few["neighbours"]["data_copying"] is None
        no_classes = compare(real[0][:50], None, reference(digits(), pixel_features(size=4)))
        assert no_classes["inception_score"] is None
        assert no_classes["recall"]["value"] > 0

    @pytest.mark.thorough
    def test_in_short_it_is_accuracy_and_two_distances(self, digits_reference, real):
        images, labels = real
        short = compare(images, labels, digits_reference, all_metrics=False)
        whole = compare(images, labels, digits_reference)
        assert short == {key: whole[key] for key in short}
        assert "precision" not in short
        assert "neighbours" not in short

    def test_rounding_to_levels_is_stated_and_done(self, digits_reference, real):
        images = real[0][:50]
        off = np.clip(images + 0.003, -1, 1)  # less than half a level of 2/255
        rounded = compare(off, None, digits_reference)
        as_they_are = compare(off, None, digits_reference, round_to_uint8=False)
        exact = compare(images, None, digits_reference)["frechet_distance"]["value"]
        assert rounded["frechet_distance"]["value"] == exact
        assert as_they_are["frechet_distance"]["value"] != exact
        assert as_they_are["frechet_distance"]["provenance"]["rounding"] == "none"
        assert rounded["accuracy"] is None
        assert rounded["accuracy_interval"] is None

    def test_wrong_labels_are_wrong(self, digits_reference, real):
        images, labels = real
        assert compare(images, (labels + 1) % 10, digits_reference)["accuracy"] < 0.03

    @pytest.mark.thorough
    def test_without_a_classifier_there_is_no_accuracy(self, real):
        images, labels = real
        found = compare(images, labels, reference(digits(), pixel_features(size=4)))
        assert found["accuracy"] is None
        assert found["classifier_test_accuracy"] is None
        assert found["frechet_distance"]["provenance"]["extractor"] == "pixels:4x4"

    @pytest.mark.thorough
    def test_logits_of_other_classes_give_an_inception_score_and_no_accuracy(self, real):
        """As those of ImageNet do: three classes, none of which is a digit."""
        own: Any = classifier_features("digits")
        apply = lambda x: (own.apply(x)[0], own.apply(x)[1][:, :3])  # noqa: E731
        others = replace(own, apply=apply, test_accuracy=None, sha256="3" * 64)
        images, labels = real
        found = compare(images, labels, reference(digits(), others))
        assert found["accuracy"] is None
        assert 1.0 < found["inception_score"]["value"] <= 3.0

    @pytest.mark.thorough
    def test_two_extractors_see_samples_that_come_once(self, digits_reference, real):
        images, labels = real
        other = reference(digits(), pixel_features(size=4))
        once = Batches(len(images), iter([images[:100], images[100:]]))
        found = compare_each(once, labels, [digits_reference, other])
        for each, alone in zip(found, (digits_reference, other), strict=True):
            by_itself = compare(images, labels, alone)["frechet_distance"]
            assert each["frechet_distance"]["provenance"] == by_itself["provenance"]
            assert each["frechet_distance"]["value"] == pytest.approx(by_itself["value"], rel=1e-4)
        assert found[1]["accuracy"] is None

    @pytest.mark.thorough
    def test_of_a_known_distribution_samples_are_held_against_it(self):
        data = colours(num_images=800)
        known = reference(data, pixel_features(size=1))
        assert data.mixture is not None
        draw = jax.jit(data.mixture.draw, static_argnums=1)
        good = np.asarray(draw(jax.random.key(1), 1500))
        found = compare(good, None, known)
        distance, weights = found["sliced_wasserstein"], found["mode_weights"]
        assert distance["value"] == pytest.approx(distance["floor"], rel=0.5)
        assert distance["provenance"]["num_samples"] == 1500
        np.testing.assert_allclose(
            weights["found"], 1 / 8, atol=5 * max(weights["standard_errors"])
        )
        # Two of eight colours are lost: a quarter of the weight is elsewhere.
        lost = compare(good[good[:, 0, 0, :2].max(1) > 0], None, known)
        assert lost["mode_weights"]["value"] == pytest.approx(0.25, abs=0.02)
        assert lost["sliced_wasserstein"]["value"] > 5 * distance["value"]
        assert "mode_weights" not in compare(good, None, known, all_metrics=False)

    def test_splits_and_samples_are_thinned_where_asked(self, real):
        found = compare(
            real[0],
            None,
            reference(digits(), pixel_features(size=2), max_images=100, max_neighbour_images=20),
        )
        assert found["frechet_distance"]["provenance"]["num_reference_images"] == 100
        assert found["neighbours"]["num_samples"] == found["neighbours"]["num_floor_images"] == 20

    @pytest.mark.parametrize(
        ("samples", "labels", "message"),
        [
            (np.zeros((5, 28, 28, 1), np.float32), None, r"not \[5, 28, 28, 1\]"),
            (np.full((5, 8, 8, 1), np.nan, np.float32), None, "5 of 5 images have pixels"),
            (np.zeros((2, 8, 8, 1), np.float32), None, "2 images are too few"),
            (np.zeros((5, 8, 8, 1), np.float32), np.zeros(4, int), r"5 samples .* \[4\]"),
            (np.zeros((5, 8, 8, 1), np.float32), np.full(5, 10), "labels must be 0 to 9"),
        ],
    )
    def test_bad_samples_are_refused(self, digits_reference, samples, labels, message):
        with pytest.raises(UserError, match=message):
            compare(samples, labels, digits_reference)


@pytest.mark.parametrize(("num_right", "num_all"), [(0, 7), (97, 100), (360, 360)])
def test_wilson_interval_is_scipys(num_right, num_all):
    exact = scipy.stats.binomtest(num_right, num_all).proportion_ci(method="wilson")
    assert wilson_interval(num_right, num_all) == pytest.approx((exact.low, exact.high), abs=1e-6)


def test_thinning_keeps_order_and_repeats_nothing():
    found = thin(np.arange(100), 30, seed=0)
    assert len(set(found)) == 30
    assert (np.diff(found) > 0).all()
    assert thin(np.arange(5), 30, seed=0).tolist() == [0, 1, 2, 3, 4]
