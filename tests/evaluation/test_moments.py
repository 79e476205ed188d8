"""Images seen batch by batch against all at once; what is stored against what is computed."""

import logging
import tracemalloc
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.data import ArraySource, DataSet, digits, to_float, to_uint8
from diffjax.errors import UserError
from diffjax.evaluation import image_statistics
from diffjax.evaluation.cached_arrays import cached
from diffjax.evaluation.extractors.features import Extractor, classifier_features, pixel_features
from diffjax.evaluation.image_statistics import Batches, collect, thinned_rows
from diffjax.evaluation.metrics import compare, reference
from diffjax.evaluation.moments import Moments
from diffjax.evaluation.scores.distances import frechet_distance, statistics
from diffjax.evaluation.scores.inception_score import inception_score


def in_parts(array, *sizes):
    return np.split(array, np.cumsum(sizes))


class TestMoments:
    @pytest.mark.parametrize("sizes", [(), (1, 1, 1), (0, 50, 7), (299,)])
    def test_of_parts_are_those_of_the_whole(self, sizes):
        x = np.random.default_rng(0).normal(3.0, 2.0, (300, 5))
        found = Moments.of(in_parts(x, *sizes)).statistics()
        assert found.n == 300
        np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-13)
        np.testing.assert_allclose(found.cov, np.cov(x, rowvar=False), rtol=1e-12)

    def test_a_mean_far_from_0_costs_no_digits(self):
        # E[x²] - E[x]² would be lost: float64 has 16 digits, and the mean's square takes all.
        x = 1e8 + np.random.default_rng(0).integers(-3, 4, (1000, 2)).astype(float)
        found = Moments.of(np.array_split(x, 17)).statistics()
        np.testing.assert_allclose(found.cov, np.cov(x - 1e8, rowvar=False), rtol=1e-7)

    def test_merging_is_in_any_order(self):
        a, b, c = (Moments.of([x]) for x in np.random.default_rng(0).normal(size=(3, 40, 4)))
        one, other = a.merge(b).merge(c), c.merge(a.merge(b))
        np.testing.assert_allclose(one.mean, other.mean, rtol=1e-12)
        np.testing.assert_allclose(one.scatter, other.scatter, rtol=1e-12)
        empty = Moments.none(4)
        assert empty.merge(empty).n == 0
        np.testing.assert_array_equal(empty.merge(a).scatter, a.scatter)

    def test_what_has_no_moments_is_refused(self):
        with pytest.raises(UserError, match="different widths, 2 and 3"):
            Moments.none(2).add(np.zeros((4, 3)))
        with pytest.raises(UserError, match="1 of 4 feature vectors are not finite"):
            Moments.none(1).add(np.array([[0.0], [1.0], [np.nan], [2.0]]))
        with pytest.raises(UserError, match="1 images are too few"):
            Moments.of([np.zeros((1, 2))]).statistics()
        with pytest.raises(UserError, match="no vectors"):
            Moments.of([])


def random_images(n, size=8, channels=1, seed=0):
    images = np.random.default_rng(seed).uniform(-1, 1, (n, size, size, channels))
    return images.astype(np.float32)


class TestSee:
    @pytest.mark.parametrize("batch_size", [1, 37, pytest.param(90, marks=pytest.mark.thorough)])
    def test_batches_are_the_whole(self, batch_size):
        images, extractor = random_images(90), classifier_features("digits")
        features, logits = extractor.extract(images)
        assert logits is not None
        parts = np.split(images, range(batch_size, 90, batch_size))
        found = collect(Batches(90, parts), extractor, most_images=50, seed=3)
        np.testing.assert_allclose(found.features, features, atol=1e-4)
        exact = statistics(features)
        np.testing.assert_allclose(found.statistics.mean, exact.mean, atol=1e-5)
        np.testing.assert_allclose(found.statistics.cov, exact.cov, atol=1e-4)
        np.testing.assert_array_equal(found.images, images[thinned_rows(90, 50, 3)])
        np.testing.assert_array_equal(found.predicted, logits.argmax(1))
        assert found.score == pytest.approx(inception_score(logits, seed=3), rel=1e-4)

    def test_features_kept_are_those_of_the_rows_drawn(self, monkeypatch):
        monkeypatch.setattr(image_statistics, "MOST_FEATURES", 13)
        images, extractor = random_images(90), pixel_features(size=2)
        found = collect(Batches(90, in_parts(images, 20, 20)), extractor, seed=1)
        rows = thinned_rows(90, 13, 1)
        np.testing.assert_array_equal(found.features, extractor.features(images[rows]))
        assert found.predicted is found.score is None

    def test_each_device_looks_at_its_rows(self):
        devices, looked = jax.local_devices(), []

        @jax.jit
        def apply(images):
            jax.debug.callback(lambda rows: looked.append(len(rows)), images, partitioned=True)
            return images.reshape(len(images), -1)[:, :3] * 2.0, None

        extractor = Extractor("three", "0" * 64, None, apply, batch_size_images=3)
        sharding = NamedSharding(Mesh(np.array(devices), "rows"), PartitionSpec("rows"))
        images = random_images(21)
        found = extractor.extract(images, sharding)[0]
        jax.effects_barrier()
        np.testing.assert_array_equal(found, images.reshape(21, -1)[:, :3] * 2.0)
        size = -(-3 // len(devices))
        num_calls = -(-21 // (size * len(devices)))
        assert Counter(looked) == {size: num_calls * len(devices)}

    def test_each_process_looks_at_its_part_and_none_at_another(self, monkeypatch):
        """Parts are recorded where processes would gather them, as test_processes.py has it."""
        images, extractor, parts = random_images(22), pixel_features(size=2), []
        gathered = {"process_allgather": lambda mine, tiled: parts.append(mine) or mine}
        monkeypatch.setattr(image_statistics, "multihost_utils", SimpleNamespace(**gathered))
        monkeypatch.setattr(jax, "process_count", lambda: 3)
        for index in range(3):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            image_statistics._in_parts(extractor, images, None)
        assert [len(part) for part in parts] == [8, 8, 8]
        np.testing.assert_array_equal(np.concatenate(parts)[:22], extractor.features(images))

    def test_memory_does_not_hang_on_how_many_there_are(self, monkeypatch):
        monkeypatch.setattr(image_statistics, "MOST_FEATURES", 50)
        extractor = pixel_features(size=2)

        def peak(num_batches):
            def made():
                for i in range(num_batches):
                    yield random_images(200, size=16, seed=i)

            images = Batches(200 * num_batches, made())
            tracemalloc.start()
            found = collect(images, extractor, most_images=50)
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert found.statistics.n == 200 * num_batches
            return most

        peak(2)
        few, many = peak(5), peak(50)
        # 9000 more images of 1 kB each; numbering those that are kept takes a few bytes each.
        assert many - few < 9000 * 32

    def test_another_number_than_announced_is_refused(self):
        with pytest.raises(UserError, match="9 images were announced and 8 came"):
            collect(Batches(9, [random_images(8)]), pixel_features(2))
        with pytest.raises(UserError, match="no images"):
            Batches(0, []).peek()

    def test_a_peek_takes_nothing_away(self):
        images = random_images(9)
        first, all_of_them = Batches(9, iter(in_parts(images, 4))).peek()
        np.testing.assert_array_equal(first, images[:4])
        np.testing.assert_array_equal(np.concatenate(list(all_of_them.batches)), images)


@pytest.fixture(scope="module")
def digits_reference():
    return reference(digits(), classifier_features("digits"))


def flat(tree):
    """The numbers of nested dicts and lists, by their paths."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): value
        for path, value in paths
        if isinstance(value, float)
    }


@pytest.fixture
def small():
    """A set, and an extractor that counts its calls."""
    images = np.random.default_rng(0).integers(0, 256, (2, 60, 8, 8, 1)).astype(np.uint8)
    train, test = (ArraySource(part, np.zeros(60, np.int32)) for part in images)
    calls = []

    def apply(batch):
        calls.append(len(batch))
        features = jnp.asarray(batch).reshape(len(batch), -1)[:, ::7]
        return features, features[:, :3]

    extractor = Extractor("counted", "1" * 64, None, apply)
    return DataSet("noise", train, test, (8, 8, 1), 1, ("all",)), extractor, calls


class TestCompareBatches:
    @pytest.mark.parametrize(
        "all_metrics",
        [pytest.param(True, id="whole", marks=pytest.mark.thorough), False],
    )
    def test_numbers_are_those_of_the_array(self, digits_reference, all_metrics):
        samples = random_images(900)
        labels = np.arange(900) % 10
        whole = compare(samples, labels, digits_reference, all_metrics=all_metrics)
        batches = Batches(900, iter(in_parts(samples, 1, 300, 250)))
        found = compare(batches, labels, digits_reference, all_metrics=all_metrics)
        assert flat(found) == pytest.approx(flat(whole), rel=1e-5)
        assert flat(whole)["frechet_distance.value"] == pytest.approx(
            frechet_distance(
                *statistics(digits_reference.extractor.features(to_float(to_uint8(samples))))[:2],
                *digits_reference.train_statistics[:2],
            )
        )

    @pytest.mark.thorough
    def test_over_devices_they_are_the_same(self, digits_reference):
        sharding = NamedSharding(Mesh(np.array(jax.local_devices()), "rows"), PartitionSpec("rows"))
        samples = random_images(100)
        one, many = (
            compare(samples, None, replace(digits_reference, sharding=place))
            for place in (None, sharding)
        )
        assert flat(many) == pytest.approx(flat(one), rel=1e-4)

    def test_a_bad_batch_is_refused_when_it_comes(self, digits_reference):
        good, bad = random_images(5), np.full((3, 8, 8, 1), np.nan, np.float32)
        with pytest.raises(UserError, match="3 of 3 images have pixels"):
            compare(Batches(8, iter([good, bad])), None, digits_reference)
        with pytest.raises(UserError, match="5 samples come with labels"):
            compare(Batches(5, iter([good])), np.zeros(4, int), digits_reference)

    def test_on_features_for_cmmd_it_is_said(self, digits_reference):
        samples = random_images(30)
        extractor = replace(digits_reference.extractor, for_cmmd=True)
        found = compare(samples, None, replace(digits_reference, extractor=extractor))["cmmd"]
        features = extractor.features(to_float(to_uint8(samples)))
        # As in CMMD's own code, in its precision.
        train = digits_reference.train_features

        def mean(x, y):
            d = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
            return np.exp(-d / (2 * 10**2)).mean()

        exact = mean(features, features) + mean(train, train) - 2 * mean(features, train)
        assert found["value"] == pytest.approx(1000 * exact, rel=1e-3)
        assert 0 <= found["floor"] < found["value"]
        assert found["provenance"]["definition"] == "arXiv:2401.09603"


class TestStored:
    def test_the_second_time_nothing_is_extracted_and_all_is_equal(self, small, tmp_path):
        data, extractor, calls = small
        first = reference(data, extractor, folder=str(tmp_path))
        num_calls = len(calls)
        second = reference(data, extractor, folder=str(tmp_path))
        assert len(calls) == num_calls > 0
        assert len(list(tmp_path.iterdir())) == 1
        np.testing.assert_array_equal(second.train_root, first.train_root)
        samples = random_images(40, seed=1)
        assert compare(samples, None, second) == compare(samples, None, first)
        assert compare(samples, None, second) == compare(samples, None, reference(data, extractor))

    @pytest.mark.parametrize("change", ["seed", "max_images", "max_neighbour_images"])
    def test_what_numbers_hang_on_is_another_file(self, small, tmp_path, change):
        data, extractor, calls = small
        reference(data, extractor, folder=str(tmp_path))
        num_calls = len(calls)
        changed: dict[str, Any] = {change: 50}
        reference(data, extractor, folder=str(tmp_path), **changed)
        assert len(calls) > num_calls
        assert len(list(tmp_path.iterdir())) == 2

    def test_other_images_or_another_extractor_are_another_file(self, small, tmp_path):
        data, extractor, _ = small
        one, other = data, replace(data, test=data.train, train=data.test)
        for dataset in (one, other):
            for sha256 in ("1" * 64, "2" * 64):
                reference(dataset, replace(extractor, sha256=sha256), folder=str(tmp_path))
        assert len(list(tmp_path.iterdir())) == 4

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
    @pytest.mark.parametrize("cut", [False, True])
    def test_a_damaged_file_is_made_again_with_a_warning(self, tmp_path, caplog, share, cut):
        exact = {"x": np.arange(300.0), "y": np.ones((2, 3), np.int32)}
        cached(str(tmp_path), {"of": 1}, lambda: exact)
        (path,) = tmp_path.iterdir()
        whole = bytearray(path.read_bytes())
        place = min(int(share * len(whole)), len(whole) - 1)
        damaged = whole[:place] if cut else whole
        if not cut:
            damaged = bytearray(whole)
            damaged[place] ^= 4
        path.write_bytes(bytes(damaged))
        with caplog.at_level(logging.WARNING, "diffjax"):
            found = cached(str(tmp_path), {"of": 1}, lambda: exact)
        assert "damaged" in caplog.text
        np.testing.assert_array_equal(found["x"], exact["x"])
        assert path.read_bytes() == bytes(whole)

    def test_a_file_under_the_name_of_another_is_not_taken(self, tmp_path, caplog):
        cached(str(tmp_path), {"of": 1}, lambda: {"x": np.ones(1)})
        (one,) = tmp_path.iterdir()
        cached(str(tmp_path), {"of": 2}, lambda: {"x": np.zeros(1)})
        (other,) = set(tmp_path.iterdir()) - {one}
        other.write_bytes(one.read_bytes())
        found = cached(str(tmp_path), {"of": 2}, lambda: {"x": np.zeros(1)})
        assert found["x"] == 0
        assert "damaged" in caplog.text

    def test_without_a_place_to_keep_it_there_is_a_warning_and_a_result(self, tmp_path, caplog):
        (tmp_path / "file").touch()
        folder = str(tmp_path / "file" / "below")
        found = cached(folder, {}, lambda: {"x": np.ones(1)})
        assert found["x"] == 1
        assert "can't write" in caplog.text

    def test_objects_are_never_stored(self, tmp_path):
        with pytest.raises(TypeError, match="arrays of objects"):
            cached(str(tmp_path), {}, lambda: {"x": np.array([{}])})
        assert not list(tmp_path.iterdir())
