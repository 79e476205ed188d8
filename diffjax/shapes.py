"""The shapes of arrays, as signatures state them.

A name in a shape is one size throughout a signature: `x: Samples, t: PerSample` are of one
batch, and `t: AnyShape` comes back as `AnyShape` of that shape. The tests check it at each call
(`tests/support/shapes.py`); elsewhere they mean `jax.Array` and no more.
"""

from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Float, Int, Key

# NumPy's arrays, and floats of shape `[]`, are taken wherever JAX's arrays are.
if TYPE_CHECKING:
    from jax import Array
else:
    Array = jax.Array | np.ndarray | np.generic | float

Samples = Float[Array, " batch *event"]
"""`[B, …]`: images, points, predictions for them."""
PerSample = Float[Array, " batch"]
"""`[B]`: times, weights, losses."""
AnyShape = Float[Array, " *shape"]
"""Numbers that are looked at one by one."""
OneNumber = Float[Array, ""]
"""`[]`."""
Intervals = Float[Array, " batch 2"]
"""`[B, 2]`: from which time, and to which."""
Images = Float[Array, " batch height width channels"]
"""`[B, H, W, C]`."""
Latents = Float[Array, " batch rows columns features"]
"""`[B, h, w, c]`: latents of images, encoded by a codec."""
Tokens = Float[Array, " batch tokens width"]
"""`[B, T, D]`."""
Queries = Float[Array, " batch queries heads width"]
"""`[B, T, heads, d]`."""
Values = Float[Array, " batch keys heads width"]
"""`[B, S, heads, d]`; of the keys too."""
NoiseLabels = Float[Array, " batch"] | Float[Array, " batch labels"]
"""`[B]`, or `[B, n]` where the network takes several."""
WalkTimes = Float[Array, " times"]
"""Those of a walk, one after the other."""
Labels = Int[Array, " batch"]
"""`[B]`."""
Keys = Key[Array, " batch"]
"""`[B]`, one for each sample."""
OneKey = Key[Array, ""]
"""`[]`."""
