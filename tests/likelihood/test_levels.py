"""Grey levels and noise levels that likelihoods are taken over."""

import jax
import numpy as np
import pytest
import scipy.stats

from diffjax.data import to_float
from diffjax.likelihood.bound import ContinuousTime, DiscreteTime, gaussian_decoder
from diffjax.likelihood.dequantise import bin_width, level_centres
from diffjax.process.paths import Coeffs, Cosine, Linear, Pair


def test_grey_levels_are_those_of_8_bit_images():
    images = to_float(np.arange(256, dtype=np.uint8))
    np.testing.assert_allclose(level_centres(), images, atol=1e-6)
    assert bin_width() == pytest.approx(2 / 255)


@pytest.mark.parametrize("time", [DiscreteTime(5), ContinuousTime()])
def test_the_prior_takes_over_in_the_noisiest_image(time):
    # The cosine path's log-SNR ends at -12.9, above where the continuous one stops.
    last = jax.jit(lambda: time.levels(Cosine()).last)
    assert float(last()) == pytest.approx(0.999, abs=1e-4)


def test_weights_of_the_steps_sum_to_half_of_the_lost_signal():
    """They telescope: `½·(SNR(t_min) - SNR(t_noise))`, with SNR = ((1 - t)/t)² on the line."""
    path = Linear(t_min=0.1, t_noise=0.9)
    u = (np.arange(8, dtype="f") + 0.5) / 8
    times, weights = jax.jit(lambda u: DiscreteTime(8).levels(path).at(u))(u)
    assert float(weights.mean()) == pytest.approx(0.5 * (81 - 1 / 81), rel=1e-4)
    assert float(times[-1]) == pytest.approx(0.9)


def test_the_gaussian_decoder_is_the_entropy_of_the_noise_that_is_left():
    """`x_t/a - x ~ N(0, (s/a)²·I)`, of which minus the entropy is the mean log-density."""
    c = Coeffs(*(np.full((1, 1, 1, 1), value, "f") for value in (0.3, 0.5, 0.2, -1.0, 1.0)))
    pair = Pair(np.zeros((1, 2, 3, 1), "f"), np.zeros((1, 2, 3, 1), "f"))
    found = gaussian_decoder(c, pair)
    np.testing.assert_allclose(found, [-6 * scipy.stats.norm(0, 0.2 / 0.5).entropy()], rtol=1e-5)
