"""The losses of autoencoders against values derived by hand, and one whole step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from diffjax.autoencoders.losses import (
    Adversary,
    Reconstruction,
    adaptive_weight,
    hinge_loss,
    kl_divergence,
    psnr,
)
from diffjax.autoencoders.step import AdversaryState, Parts, make_step
from diffjax.codecs.base import Posterior
from diffjax.errors import UserError
from diffjax.optimizers.base import Optimizer
from diffjax.training.averages import Averages
from diffjax.training.state import TrainState
from tests.support.toy_autoencoder import Logits, Toy

X = np.array([0.9, -0.4, 0.2, -0.6])
A, W, V = 0.5, 0.8, 0.3
FOUND = W * A * X


def test_the_kl_divergence_is_the_integral_of_its_definition():
    moments = [(0.0, 0.0), (1.5, -1.0), (-0.7, 0.8), (0.2, -3.0)]

    def integral(mean, log_variance):
        scale = np.exp(log_variance / 2)

        def at(z):
            ratio = norm.logpdf(z, mean, scale) - norm.logpdf(z)
            return norm.pdf(z, mean, scale) * ratio

        return quad(at, -12, 12)[0]

    mean, log_variance = np.float32(moments).T.reshape(2, 2, 1, 1, 2)
    expected = np.reshape([integral(*each) for each in moments], (2, 2)).sum(axis=1)
    np.testing.assert_allclose(kl_divergence(Posterior(mean, log_variance)), expected, rtol=1e-5)


def test_hinge_adaptive_weight_and_psnr_by_hand():
    # ½·mean(0.5, 0, 3) + ½·mean(0, 1.5)
    found = hinge_loss(jnp.array([0.5, 1.0, -2.0]), jnp.array([-4.0, 0.5]))
    np.testing.assert_allclose(found, 0.5 * 3.5 / 3 + 0.5 * 0.75, rtol=1e-6)
    weight = adaptive_weight(jnp.ones(4), jnp.full(1, 0.3))
    np.testing.assert_allclose(weight, 2 / 0.3001, rtol=1e-6)
    assert adaptive_weight(jnp.ones(4), jnp.zeros(3)) == 1e4
    # An error of 2 of a range of 2 is 0 dB; what is beyond the range is clipped first.
    images = jnp.array([-1.0, 1.0]).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(psnr(images, jnp.array([3.0, 0.8])[:, None, None, None])[0], 0.0)
    np.testing.assert_allclose(psnr(images, jnp.full((2, 1, 1, 1), 0.8))[1], 20.0, rtol=1e-5)


@pytest.mark.parametrize(("error", "power"), [("l1", 1), ("l2", 2)])
def test_the_likelihood_is_a_sum_with_a_scale(error, power):
    loss = Reconstruction(error, log_variance=0.5)
    difference = np.float32([[0.5, -0.25], [1.0, 0.0]]).reshape(2, 1, 2, 1)
    distance = jnp.array([0.1, 0.2])
    found = loss.negative_log_likelihood(jnp.zeros((2, 1, 2, 1)), difference, distance)
    sums = np.array([0.5**power + 0.25**power, 1.0])
    expected = (sums + 2 * np.array([0.1, 0.2])) / np.exp(0.5) + 2 * 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_an_unknown_error_is_refused():
    with pytest.raises(UserError, match=r"config.loss.error='l3': known: l1, l2"):
        Reconstruction("l3")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _stepped(error, stochastic, numbers):
    """One program for all numbers, which may be traced."""
    start_step, rate, adversary_rate, kl_weight, log_variance, ahead = numbers

    def point(opt_state, params):
        del opt_state
        return jax.tree.map(lambda x: x + ahead, params)

    parts = Parts(
        Toy(stochastic=stochastic),
        Reconstruction(error, kl_weight, log_variance),
        Adversary(Logits(), 0.5, start_step),
        Optimizer(optax.sgd(rate), lambda n: rate),
        Optimizer(optax.sgd(adversary_rate), lambda n: adversary_rate, point),
        Averages(),
        (1, 1, 1),
    )
    state = parts.init(jax.random.key(0))
    images = jnp.asarray(X, jnp.float32).reshape(-1, 1, 1, 1)
    return make_step(parts)(state, jax.random.key(1), images, ())


def after_a_step(error="l2", stochastic=False, **changed):
    """Parameters and metrics after the first step of the toy with gradient descent."""
    numbers = {"start_step": 0, "rate": 1.0, "adversary_rate": 1.0, "kl_weight": 0.0}
    numbers |= {"log_variance": 0.0, "ahead": 0.0} | changed
    return _stepped(error, stochastic, tuple(numbers.values()))


def numbers(state: TrainState):
    """a, w and v."""
    memory: AdversaryState = state.memory
    params = state.params["encoder"], state.params["decoder"], memory.params["factor"]
    return [float(each["kernel"]) for each in params]


def test_a_step_of_both_is_that_derived_by_hand():
    state, metrics = after_a_step()
    # d/dw and d/da of mean (wax - x)² and of -mean(v·wax).
    to_w, to_a = np.mean(2 * (FOUND - X) * A * X), np.mean(2 * (FOUND - X) * W * X)
    term_w, term_a = -V * np.mean(A * X), -V * np.mean(W * X)
    weight = 0.5 * abs(to_w) / (abs(term_w) + 1e-4)
    # Both hinges are open: |v·x| < 1.
    to_v = 0.5 * (np.mean(-X) + np.mean(FOUND))
    expected = [A - to_a - weight * term_a, W - to_w - weight * term_w, V - to_v]
    np.testing.assert_allclose(numbers(state), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["adversary_weight"], weight, rtol=1e-5)
    loss = np.mean((FOUND - X) ** 2) - weight * V * np.mean(FOUND)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    hinges = 0.5 * (np.mean(1 - V * X) + np.mean(1 + V * FOUND))
    np.testing.assert_allclose(metrics["adversary_loss"], hinges, rtol=1e-5)


def test_the_adversary_learns_at_the_point_of_its_optimizer():
    """Far ahead of v the hinges of images above 0 and reconstructions below 0 are closed."""
    state, _ = after_a_step(ahead=100.0)
    to_v = 0.5 * (np.mean(-X * (X < 0)) + np.mean(FOUND * (FOUND > 0)))
    np.testing.assert_allclose(numbers(state)[2], V - to_v, rtol=1e-5)


def test_before_its_start_neither_learns_from_the_other():
    state, metrics = after_a_step(start_step=1)
    to_w, to_a = np.mean(2 * (FOUND - X) * A * X), np.mean(2 * (FOUND - X) * W * X)
    np.testing.assert_allclose(numbers(state), [A - to_a, W - to_w, V], rtol=1e-6)
    assert metrics["adversary_weight"] == metrics["adversary_loss"] == 0


def test_neither_gradient_reaches_the_other_bit_for_bit():
    first, _ = after_a_step()
    without, _ = after_a_step(adversary_rate=0.0)
    assert numbers(first)[:2] == numbers(without)[:2]
    assert numbers(without)[2] == np.float32(V) != numbers(first)[2]
    without, _ = after_a_step(rate=0.0)
    assert numbers(without)[:2] == [np.float32(A), np.float32(W)]
    other, _ = after_a_step(error="l1", log_variance=0.3)
    assert numbers(first)[2] == numbers(without)[2] == numbers(other)[2]


def test_the_kl_weight_moves_the_encoder_alone():
    """By d/da of the mean of ½·(a·x)²: the variance is fixed, and the decoder is no part of it."""
    small, metrics = after_a_step(stochastic=True, kl_weight=0.0, rate=0.1)
    large, _ = after_a_step(stochastic=True, kl_weight=2.0, rate=0.1)
    moved = np.subtract(numbers(large), numbers(small))
    np.testing.assert_allclose(moved[0], -0.1 * 2.0 * np.mean(A * X**2), rtol=1e-5)
    assert moved[1] == moved[2] == 0
    kl = 0.5 * np.mean((A * X) ** 2 + np.exp(-2.0) - 1 + 2.0)
    np.testing.assert_allclose(metrics["rate"], kl / np.log(2), rtol=1e-5)
