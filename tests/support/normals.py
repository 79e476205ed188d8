"""Independent normal data in closed form: their best denoiser is a few operations to compile."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.process.paths import Pair, Path


class Normals(NamedTuple):
    """Means and variances of the numbers of a sample, `[d]` each."""

    mean: Any
    variance: Any

    def pair(self, path: Path, x: Array, t: Array) -> Pair:
        """`E[x0 | x_t]` and `E[eps | x_t]`, of `x[B, d]` at a time `t[]` or at times `t[B, 1]`."""
        a, s = path.alpha(t), path.sigma(t)
        mean, variance = self.mean[None], self.variance[None]
        white = (x - a * mean) / (a**2 * variance + s**2)
        return Pair(jnp.asarray(mean) + a * variance * white, s * white)

    def flow(self, a: Any, s: Any, x: Any) -> np.ndarray:
        """Where the flow carries `x[B, d]` from the first of the scales, at each: `[n, B, d]`."""
        a, s = (np.reshape(np.asarray(of, np.float64), (-1, 1, 1)) for of in (a, s))
        deviations = np.sqrt(a**2 * self.variance + s**2)
        return a * self.mean + (np.asarray(x) - a[0] * self.mean) / deviations[0] * deviations
