"""Whether pictures match their prompts, by classifiers of pixels."""

import itertools

import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.evaluation.scores.prompt_match import (
    discriminant,
    features_of,
    judge_of,
    right_of,
    with_copies,
)


def test_the_discriminant_is_that_of_gaussians_of_one_covariance():
    rng = np.random.default_rng(0)
    covariance = np.array([[2.0, 0.8], [0.8, 1.0]])
    means = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    labels = np.arange(30_000) % 3
    noise = rng.multivariate_normal(np.zeros(2), covariance, len(labels))
    fitted = discriminant(means[labels] + noise, labels, 3, ridge=0.0)
    points = rng.normal(size=(50, 2))
    away = points[:, None] - means
    density = -0.5 * np.einsum("nki,ij,nkj->nk", away, np.linalg.inv(covariance), away)
    found = fitted.logits(points)
    # Equal up to what all classes share.
    np.testing.assert_allclose(found - found[:, :1], density - density[:, :1], rtol=0.1, atol=0.15)
    with pytest.raises(UserError, match="class 3 has no picture"):
        discriminant(noise, labels, 4)


def test_the_right_one_of_some_is_the_mean_over_all_choices_of_others():
    logits = np.random.default_rng(1).normal(size=(4, 7))
    right = np.array([0, 3, 6, 2])
    for row, own in enumerate(right):
        others = [k for k in range(7) if k != own]
        first = [
            logits[row, own] > logits[row, list(some)].max()
            for some in itertools.combinations(others, 3)
        ]
        assert right_of(logits, right, of=4)[row] == pytest.approx(np.mean(first))
    with pytest.raises(UserError, match="the right one of 50, among 7 classes"):
        right_of(logits, right)


def picture(colour, side):
    image = np.ones((64, 64, 3), np.float32)
    image[32 - side : 32 + side, 32 - side : 32 + side] = colour
    return image


def test_a_judge_finds_captions_and_attributes_of_new_compositions():
    colours = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1)}
    sizes = {"small": 10, "middle": 17, "large": 26}
    names = [(colour, size) for colour in colours for size in sizes]
    held_out = ("green", "middle")
    train = [name for name in names if name != held_out]
    images = np.stack([picture(colours[c], sizes[s]) for c, s in train])
    attributes = [{"colour": c, "size": s} for c, s in train]
    captions = [f"{c} {s}" for c, s in train]
    judge = judge_of(images, captions, attributes, copies=6)
    changed = with_copies(images, 1, seed=5)[len(images) :]
    np.testing.assert_allclose(judge.matched(changed, captions, of=5), 1.0)
    new = features_of(picture(colours["green"], sizes["middle"])[None])
    assert judge.has(new, "colour", ["green"]).all()
    assert judge.has(new, "size", ["middle"]).all()
    assert not judge.has(new, "colour", ["red"]).any()
    with pytest.raises(UserError, match="no picture with the caption 'green middle'"):
        judge.matched(new, ["green middle"], of=5)


def test_features_are_means_over_squares_and_shares_of_colours():
    images = np.random.default_rng(2).normal(size=(2, 32, 32, 3)).astype(np.float32)
    found = features_of(images)
    small = found[:, :768].reshape(2, 16, 16, 3)
    np.testing.assert_allclose(small[1, 3, 5], images[1, 6:8, 10:12].mean((0, 1)), rtol=1e-5)
    red = np.tile(np.array([0.9, -0.9, -0.9], np.float32), (1, 16, 16, 1))
    shares = features_of(red)[0, 768:] / 4
    np.testing.assert_allclose(np.sort(shares)[-2:], [0, 1])
    with pytest.raises(UserError, match="pictures of 30x30 pixels are not multiples of 16"):
        features_of(images[:, :30, :30])
