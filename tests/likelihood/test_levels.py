"""Grey levels and noise levels that likelihoods are taken over."""

import jax
import numpy as np
import pytest

from diffjax.data import to_float
from diffjax.likelihood.bound import ContinuousTime, DiscreteTime
from diffjax.likelihood.dequantise import bin_width, level_centres
from diffjax.process.paths import Cosine, Linear


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
