"""What `conftest.py` switches on: shapes that signatures state, and no implicit ranks."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError, jaxtyped

from diffjax.evaluation.scores.distances import symmetric_root
from diffjax.models.layers.common import frequency_embedding
from diffjax.objectives.denoising import pixel_mean
from diffjax.process.paths import Linear, coeffs
from diffjax.sampling.sample import padded
from diffjax.shapes import PerSample, Samples
from tests.support.shapes import checked

TABLE = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: coeffs(Linear(), TABLE, ndim=2),
        lambda: pixel_mean(np.float32(1.0)),
        lambda: padded(TABLE),
        lambda: frequency_embedding(TABLE, 4),
        lambda: symmetric_root(TABLE),
    ],
    ids=["process", "objectives", "sampling", "models", "evaluation"],
)
def test_another_shape_than_the_stated_one_is_refused(wrong):
    with pytest.raises(TypeCheckError):
        wrong()


def test_a_name_stands_for_one_size_in_arguments_and_result():
    @jaxtyped(typechecker=checked)
    def kept(x: Samples, t: PerSample, length: int) -> PerSample:
        return t[:length]

    assert kept(TABLE, TABLE[:, 0], 2).shape == (2,)
    with pytest.raises(TypeCheckError, match="parameter 't'"):
        kept(TABLE, TABLE[0], 2)
    with pytest.raises(TypeCheckError, match="return value"):
        kept(TABLE, TABLE[:, 0], 1)
    kept(TABLE, TABLE[:, 0], np.int64(2))  # hints without a shape are not checked


def test_ranks_are_not_promoted():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.add(jnp.ones((2, 3)), jnp.ones(3))
