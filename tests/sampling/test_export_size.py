"""What fits into an exported file."""

import jax
import jax.numpy as jnp
import pytest

from diffjax.errors import UserError
from diffjax.sampling.export import check_export_size


def weights(num_bytes):
    return {"w": jax.ShapeDtypeStruct((num_bytes // 4,), jnp.float32)}


def test_weights_have_to_fit_into_two_gigabytes_beside_the_program():
    """A file is one message of protobuf, which holds less than 2³¹ bytes."""
    check_export_size(weights(2_000_000_000))
    with pytest.raises(UserError, match=r"weights are 2\.0 GB"):
        check_export_size(weights(2**31 - 4))
