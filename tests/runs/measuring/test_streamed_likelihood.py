"""Of the test images one batch at a time is in memory."""

from collections import namedtuple
from typing import ClassVar

import jax
import numpy as np
import pytest

import diffjax
from diffjax.data import ArraySource, DataSet, eval_batches
from diffjax.likelihood.dequantise import Dequantised
from diffjax.runs.measuring import likelihoods
from tests.support.old_runs import OLD_RUN

Found = namedtuple("Found", "log_p standard_error nfe")


class Counted(ArraySource):
    """Remembers how many images were read at once."""

    read: ClassVar[list[int]] = []

    def gather(self, rows):
        self.read.append(len(rows))
        return super().gather(rows)


@pytest.fixture(scope="module")
def run(old_run):
    return old_run


def spread(keys, x):
    return Dequantised(x, *np.zeros((2, 1), np.float32))


def test_each_image_has_its_number_and_its_key_whatever_the_batch(run):
    images = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 1), np.uint8)
    source = Counted(images, np.arange(20, dtype=np.int32) % 10)
    key = jax.random.key(3)

    def estimate(predict, path, x, keys, labels):
        noise = jax.vmap(lambda key: jax.random.uniform(key))(keys)
        return Found(x[:, 0, 0, 0] + 10.0 * labels, noise, jax.numpy.int32(7))

    found = {}
    for size in (8, 16, 24):
        Counted.read.clear()
        measure = likelihoods.measurer(
            run.model(), likelihoods._as_they_are, key, size, lambda: None
        )
        found[size] = measure(estimate, True, eval_batches(source, batch_size=size))
        assert max(Counted.read) <= size
    log_p, errors, nfe = found[8]
    grey = np.arange(20) / 127.5 - 1.0
    np.testing.assert_allclose(log_p, grey + 10.0 * (np.arange(20) % 10), rtol=1e-5)
    assert nfe == 7
    expected = [
        jax.random.uniform(jax.random.split(jax.random.fold_in(key, i))[1]) for i in range(20)
    ]
    np.testing.assert_array_equal(errors, np.array(expected))
    for other in found.values():
        np.testing.assert_array_equal(other[0], log_p)
        np.testing.assert_array_equal(other[1], errors)


def test_a_measurement_reads_no_more_than_a_batch(monkeypatch):
    run = diffjax.load(OLD_RUN)  # on eight devices
    Counted.read.clear()
    source = Counted(np.zeros((40, 8, 8, 1), np.uint8), np.zeros(40, np.int32))
    data = DataSet("black", source, source, (8, 8, 1), 10, tuple("0123456789"))
    calls = []

    def measurer(model, spread, key, batch_size, beat):
        def measure(estimate, discrete, batches):
            sizes = [len(batch["label"]) for batch in batches]
            calls.append(sizes)
            return np.zeros(sum(sizes)), np.zeros(sum(sizes)), 3

        return measure

    monkeypatch.setattr(likelihoods, "measurer", measurer)
    found = likelihoods.measure_likelihood(
        run, data, likelihoods.WantedBits("ode", batch_size=12, num_images=38)
    )
    # A mesh of eight devices takes 16 at once; the larger steps are tried on the 12 requested.
    assert calls == [[16, 16, 6], [12]]
    assert max(Counted.read) == 16
    assert found["num_images"] == 38
    assert found["bits_per_dim"] == found["coarser_steps_change"] == 0.0
