"""The shapes of arrays, as signatures state them.

A name in a shape stands for one size throughout a signature: `x: Samples, t: PerSample` are of one
batch, and `t: AnyShape` comes back as `AnyShape` of that shape. The tests check it at each call
(`tests/support/shapes.py`); elsewhere these are `jax.Array`.
"""

from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Float, Int, Key

# NumPy's arrays are taken wherever JAX's are, though no function promises to return one.
if TYPE_CHECKING:
    from jax import Array
else:
    Array = jax.Array | np.ndarray

Samples = Float[Array, " batch *event"]
"""`[B, …]`: images, points, predictions for them."""
PerSample = Float[Array, " batch"]
"""`[B]`: times, weights, losses."""
AnyShape = Float[Array, " *shape"]
"""Numbers that are looked at one by one."""
OneNumber = Float[Array, ""]
"""`[]`."""
Labels = Int[Array, " batch"]
"""`[B]`."""
Keys = Key[Array, " batch"]
"""`[B]`, one for each sample."""
OneKey = Key[Array, ""]
"""`[]`."""
