"""Splits with few pictures per class: the wanted share of all, never a class's last picture."""

import numpy as np
import pytest

from diffjax.data import digits
from diffjax.data.sources import stratified_split
from diffjax.errors import UserError


def numbers(sizes, fraction: float, seed: int = 0) -> np.ndarray:
    """How many of each class are for testing; nothing is lost and nothing twice."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    train, test = stratified_split(labels, fraction, seed)
    np.testing.assert_array_equal(np.sort([*train, *test]), np.arange(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(test) > 0).all()
    return np.bincount(labels[test], minlength=len(sizes))


@pytest.mark.parametrize("each", [2, 3, 5, 9])
def test_a_tenth_of_few_pictures_a_class_is_a_tenth(each):
    """Of 2, 3 and 5 a class a tenth once took 50, 33 and 20 %."""
    found = numbers([each] * 20, 0.1)
    assert found.sum() == round(0.1 * 20 * each)
    assert set(found) <= {0, 1}


def test_largest_remainders_by_hand():
    """0.1·(14, 25, 31, 8, 12) = 1.4, 2.5, 3.1, 0.8, 1.2: nine in all, of which seven are whole."""
    assert numbers([14, 25, 31, 8, 12], 0.1).tolist() == [1, 3, 3, 1, 1]


def test_no_class_loses_its_last_picture():
    """Classes of one picture have none for testing; a larger class then has one more."""
    assert numbers([1] * 10 + [10], 0.5).tolist() == [0] * 10 + [6]
    assert numbers([2, 2, 2], 0.9).tolist() == [1, 1, 1]
    assert numbers([1, 1, 1, 1, 30], 0.1)[:4].tolist() == [0] * 4


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.7])
def test_every_class_has_its_quota_up_to_one(fraction):
    """The quota rule of largest remainders, on sizes that allow it."""
    random = np.random.default_rng(1)
    for _ in range(20):
        sizes = random.integers(10, 200, random.integers(1, 30))
        found = numbers(sizes, fraction)
        assert found.sum() == max(round(fraction * sizes.sum()), 1)
        assert (np.abs(found - fraction * sizes) < 1).all()


def test_equal_remainders_are_drawn_by_the_seed_and_not_by_the_alphabet():
    found = np.stack([numbers([3] * 10, 0.1, seed) for seed in range(60)])
    assert (found.sum(axis=1) == 3).all()
    # 18 of 60 expected each, with a deviation of 3.5.
    assert (np.abs(found.sum(axis=0) - 18) < 5 * 3.5).all()
    np.testing.assert_array_equal(found[7], numbers([3] * 10, 0.1, 7))


def test_a_fraction_of_0_trains_on_all():
    train, test = stratified_split(np.array([0, 1, 1, 2]), 0.0, 0)
    assert (train.tolist(), test.tolist()) == ([0, 1, 2, 3], [])
    data = digits(test_fraction=0)
    assert (len(data.train), len(data.test)) == (1797, 0)
    assert data.describe()["test_images"] == 0
    assert data.test.fingerprint() != data.train.fingerprint()


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_other_fractions_are_refused(fraction):
    with pytest.raises(UserError, match=r"at least 0 and below 1"):
        stratified_split(np.zeros(10, int), fraction, 0)


def test_one_picture_a_class_says_how_to_train_on_all():
    with pytest.raises(UserError, match=r"leave none to test on: test_fraction=0 trains on all"):
        stratified_split(np.arange(5), 0.1, 0)


def test_classes_of_many_pictures_are_split_as_before():
    """Largest remainders and rounding agree on digits: runs on them go on."""
    labels = np.repeat(np.arange(10), [178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    rounded = [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]  # of 35.6, 36.4, 35.4, 36.6, 36.2, …
    assert numbers(np.bincount(labels), 0.2).tolist() == rounded
