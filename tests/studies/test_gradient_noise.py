"""The gradient noise scale, compared with linear regression on Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.studies.gradient_noise import noise_by_log_snr, noise_scale

# The loss ½((w - w*)·x - e)² with x ~ N(0, I_d), e ~ N(0, σ²) has the gradient (δ·x - e)x with
# δ = w - w*. Isserlis' theorem: its mean is δ and the trace of its covariance (d + 1)|δ|² + dσ².
DIM, SIGMA = 6, 0.5
DELTA = np.linspace(-1.0, 1.5, DIM)
SQUARE = float(DELTA @ DELTA)
TRACE = (DIM + 1) * SQUARE + DIM * SIGMA**2


def draw(rng, num):
    x = rng.standard_normal((num, DIM))
    return (x @ DELTA - SIGMA * rng.standard_normal(num))[:, None] * x


def estimates(num_batches, batch_size, trials=600):
    rng = np.random.default_rng(0)
    gradients = draw(rng, trials * num_batches * batch_size)
    means = gradients.reshape(trials, num_batches, batch_size, DIM).mean(axis=2)
    return [noise_scale(one.astype(np.float32), batch_size) for one in means]


@pytest.mark.parametrize(("num_batches", "batch_size"), [(16, 1), (5, 8)])
def test_both_parts_are_unbiased(num_batches, batch_size):
    found = estimates(num_batches, batch_size)
    for values, exact in (
        ([one.squared_norm for one in found], SQUARE),
        ([one.trace for one in found], TRACE),
    ):
        error = np.std(values, ddof=1) / np.sqrt(len(values))
        assert abs(np.mean(values) - exact) < 4 * error
        assert error < 0.1 * exact


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    found = estimates(num_batches=16, batch_size=16, trials=300)
    held = [
        one.low is not None and one.low <= TRACE / SQUARE and (one.high or np.inf) >= TRACE / SQUARE
        for one in found
    ]
    assert 0.90 < np.mean(held) < 0.99
    assert all(one.examples == 256 for one in found)


def test_with_many_examples_it_is_the_ratio():
    gradients = draw(np.random.default_rng(1), 1024 * 256).reshape(1024, 256, DIM).mean(axis=1)
    assert noise_scale(gradients, 256).scale == pytest.approx(TRACE / SQUARE, rel=0.1)


def test_a_gradient_that_is_all_noise_has_no_upper_end():
    gradients = np.random.default_rng(0).standard_normal((16, 1000))
    found = noise_scale(gradients, examples_each=4)
    assert found.high is None
    assert found.trace == pytest.approx(4 * 1000, rel=0.1)
    assert abs(found.squared_norm) < 0.05 * found.trace


def test_two_batches_are_refused():
    with pytest.raises(UserError, match="three batches"):
        noise_scale(np.ones((2, 3)), 1)


def test_each_bin_has_the_scale_of_its_own_examples():
    """The mean gradient is δ times e^(λ/2); x and the noise don't depend on λ, so B falls."""

    def loss_of(params, key):
        level_key, x_key, noise_key = jax.random.split(key, 3)
        level = jax.random.uniform(level_key, minval=-2.0, maxval=2.0)
        x = jax.random.normal(x_key, (DIM,))
        wrong = (params["w"] - 0.3 * jnp.ones(DIM)) @ x * jnp.exp(level / 2)
        return 0.5 * (wrong - SIGMA * jax.random.normal(noise_key)) ** 2, level

    params = {"w": jnp.asarray(DELTA + 0.3, jnp.float32)}
    found = noise_by_log_snr(
        loss_of, params, jax.random.key(0), edges=(-2, -1, 0, 1, 2, 4), num_batches=128,
        batch_size=32,
    )  # fmt: skip
    assert found.share[:4] == pytest.approx([0.25] * 4, abs=0.02)
    assert found.share[4] == 0.0
    assert found.bins[4] is None
    for low, one in zip((-2, -1, 0, 1), found.bins[:4], strict=True):
        # With z = e^(λ/2): the gradient is z(zδ·x - e)x, of mean E[z²]δ and mean square
        # E[z⁴](d + 2)|δ|² + E[z²]dσ².
        z = np.exp(np.linspace(low, low + 1, 2001) / 2)
        square = np.mean(z**2) ** 2 * SQUARE
        trace = np.mean(z**4) * (DIM + 2) * SQUARE + np.mean(z**2) * DIM * SIGMA**2 - square
        assert one is not None
        assert one.squared_norm == pytest.approx(square, rel=0.25)
        assert one.trace == pytest.approx(trace, rel=0.25)
        assert (one.low or 0.0) < trace / square < (one.high or np.inf)


def test_a_gradient_that_is_not_finite_is_said():
    def loss_of(params, key):
        return jnp.log(params) * jax.random.normal(key), jax.random.uniform(key)

    with pytest.raises(UserError, match="log-SNR 0 … 1 is not finite"):
        noise_by_log_snr(loss_of, jnp.float32(0.0), jax.random.key(0), edges=(0.0, 1.0))
