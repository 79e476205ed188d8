"""Couplings against every permutation, closed limits, and the noise's own distribution."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from diffjax.errors import UserError
from diffjax.objectives import couplings
from diffjax.objectives.couplings import squared_distances
from diffjax.process.paths import Pair


def batch_of(x):
    return {"image": x, "cond": jnp.arange(len(x))}


def cost(pair):
    difference = np.asarray(pair.x0 - pair.eps, np.float64)
    return np.sum(difference**2) / len(difference)


def which(noise, found):
    """The index in `noise` of each that was found."""
    found, noise = (np.asarray(each).reshape(len(each), 1, -1) for each in (found, noise))
    return np.argmin(np.sum((found - noise.swapaxes(0, 1)) ** 2, axis=2), axis=1)


distances = jax.jit(squared_distances)


def normals(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@jax.jit
def optimal_and_independent(x, noise):
    """The key is not used."""
    key = jax.random.key(0)
    return [
        coupling(key, batch_of(x), noise)[:2]
        for coupling in (couplings.OptimalTransport(), couplings.Independent())
    ]


@pytest.mark.parametrize("seed", range(3))
def test_optimal_transport_is_the_best_of_all_permutations(seed):
    x, noise = normals(seed, 2, 5, 2, 2, 1)
    pair, independent = (Pair(*found) for found in optimal_and_independent(x, noise))
    x_64, noise_64 = (np.asarray(each, np.float64) for each in (x, noise))
    costs = [
        np.sum((x_64 - noise_64[list(order)]) ** 2) / 5
        for order in itertools.permutations(range(5))
    ]
    assert len(costs) == 120
    assert cost(pair) == pytest.approx(min(costs), rel=1e-6)
    assert cost(independent) == pytest.approx(costs[0], rel=1e-6)
    assert cost(pair) <= cost(independent)
    # Images stay where their labels are, and each noise goes to one of them.
    np.testing.assert_array_equal(pair.x0, x)
    assert sorted(which(noise, pair.eps)) == list(range(5))


def test_optimal_transport_on_a_line_sorts():
    (x0, eps), _ = optimal_and_independent(*normals(1, 2, 64, 1))
    assert (np.diff(np.ravel(eps)[np.argsort(np.ravel(x0))]) > 0).all()


@jax.jit
def within(x, noise, cond):
    batch = {"image": x, "cond": cond}
    return couplings.OptimalTransportWithin()(jax.random.key(0), batch, noise)[:2]


def test_transport_within_classes_is_the_assignment_of_each_class_alone():
    x, noise = normals(8, 2, 24, 2, 2, 1)
    labels = np.random.default_rng(8).integers(0, 3, 24)
    x0, eps = within(x, noise, labels)
    found = which(noise, eps)
    np.testing.assert_array_equal(x0, x)
    np.testing.assert_array_equal(labels[found], labels)
    costs = np.sum((x[:, None] - noise[None]).astype(np.float64) ** 2, axis=(2, 3, 4))
    for label in range(3):
        rows = np.flatnonzero(labels == label)
        own = costs[np.ix_(rows, rows)]
        assert set(found[rows]) == set(rows)
        np.testing.assert_array_equal(
            found[rows], rows[scipy.optimize.linear_sum_assignment(own)[1]]
        )


def test_transport_within_equal_and_unlike_conditions():
    """One class is all noise, classes of one are independent; all arrays of a tree count."""
    x, noise = normals(9, 2, 12, 3)
    (_, best), (_, own) = optimal_and_independent(x, noise)
    for cond in (np.zeros(12, int), {"a": np.ones((12, 2)), "b": np.zeros(12, bool)}):
        np.testing.assert_array_equal(within(x, noise, cond)[1], best)
    for cond in (np.arange(12), {"a": np.arange(12) % 4, "b": np.arange(12)[:, None] // 4}):
        np.testing.assert_array_equal(within(x, noise, cond)[1], own)


def test_noise_of_each_class_is_normal_within_classes_and_not_across():
    """Two classes far apart: across them, each gets the half of the noise on its side."""
    labels = np.arange(64) % 2
    noise = normals(10, 64, 1)
    x = (8.0 * labels[:, None] - 4.0 + normals(11, 64, 1)).astype(np.float32)
    (_, across), _ = optimal_and_independent(x, noise)
    _, eps = within(x, noise, labels)
    for label in (0, 1):
        rows = labels == label
        np.testing.assert_array_equal(np.sort(eps[rows], axis=0), np.sort(noise[rows], axis=0))
    assert np.max(across[labels == 0]) < np.min(across[labels == 1])


@jax.jit
def entropic(epsilon, x, noise, keys):
    """The index of the noise that each image gets, for each key, `[K, B]`."""

    def draw(key):
        pair = couplings.EntropicTransport(epsilon)(key, batch_of(x), noise)
        return jnp.argmin(squared_distances(pair.eps, noise), axis=1)

    return jax.vmap(draw)(keys)


def test_entropic_transport_lies_between_the_optimal_and_the_independent():
    """At epsilon near 0 it is exact where the best is far from the rest, at a large one uniform."""
    x = np.array([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [5.0, 5.0]], np.float32)
    shuffled = np.array([2, 0, 3, 1])
    noise = x[shuffled] + np.float32(0.1 * np.random.default_rng(0).standard_normal((4, 2)))
    keys = jax.random.split(jax.random.key(1), 400)
    (_, eps), _ = optimal_and_independent(x, noise)
    best = which(noise, eps)
    assert (best == np.argsort(shuffled)).all()
    assert (np.asarray(entropic(0.02, x, noise, keys)) == best).all()
    # Each image gets each noise alike: chi-squared of 4 x 400 draws.
    found = np.asarray(entropic(100.0, x, noise, keys))
    for image in range(4):
        counts = np.bincount(found[:, image], minlength=4)
        assert scipy.stats.chisquare(counts).pvalue > 1e-4
    # And independently of the other images.
    assert abs(np.mean(found[:, 0] == found[:, 1]) - 0.25) < 4.5 * np.sqrt(0.25 * 0.75 / 400)


def test_entropic_costs_rise_with_epsilon():
    x, noise = normals(2, 2, 4, 2)
    keys = jax.random.split(jax.random.key(3), 400)
    costs = np.asarray(distances(x, noise))
    means = [
        np.mean(costs[np.arange(4), entropic(epsilon, x, noise, keys)])
        for epsilon in (0.03, 0.3, 30.0)
    ]
    (optimal, _) = optimal_and_independent(x, noise)
    least = cost(Pair(*optimal))
    assert least < means[0] < means[1] < means[2]
    assert means[2] == pytest.approx(costs.mean(), rel=0.05)


@pytest.mark.parametrize(
    "coupling",
    [
        couplings.OptimalTransport(),
        pytest.param(couplings.EntropicTransport(), marks=pytest.mark.thorough(tenth=False)),
    ],
)
def test_coupled_noise_is_still_normal(coupling):
    """Over batches; within one, the noise goes with the image."""

    @jax.jit
    def draw(key):
        data_key, noise_key, coupling_key = jax.random.split(key, 3)
        x = 2.0 * jax.random.bernoulli(data_key, 0.3, (16, 1)) - 1.0
        return coupling(coupling_key, batch_of(x), jax.random.normal(noise_key, (16, 1)))

    x0, eps, _ = jax.lax.map(draw, jax.random.split(jax.random.key(4), 300))
    # One of each batch: within one they may be drawn twice. The key is fixed.
    picked = np.arange(300) % 16
    one_each = np.asarray(eps)[np.arange(300), picked, 0]
    assert scipy.stats.kstest(one_each, "norm").pvalue > 1e-4
    assert np.corrcoef(np.ravel(x0), np.ravel(eps))[0, 1] > 0.5


def test_given_takes_the_source_of_the_data():
    x, source, noise = normals(5, 3, 4, 2)
    batch = {"image": x, "label": np.arange(4), "cond": np.arange(4)}
    pair = couplings.Given()(jax.random.key(0), {**batch, "source": source}, noise)
    np.testing.assert_array_equal(pair.eps, source)
    np.testing.assert_array_equal(pair.x0, x)
    with pytest.raises(UserError, match="only image, label; take a data set of pairs"):
        couplings.Given()(jax.random.key(0), batch, noise)


def test_squared_distances_are_those_of_a_loop():
    x, y = normals(6, 2, 5, 2, 3)
    expected = [[np.sum((a.astype(np.float64) - b) ** 2) for b in y] for a in x]
    np.testing.assert_allclose(distances(x, y), expected, rtol=1e-5)
