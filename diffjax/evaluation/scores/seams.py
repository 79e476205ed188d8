"""Whether pictures continue at their opposite side."""

import numpy as np

from diffjax.models.layers.seamless import AXES


def jump_at_edges(images: np.ndarray, axes: str = "both") -> float:
    """The mean jump across the edges of images, over that between neighbouring pixels inside.

        mean |x_0 − x_{n−1}| / mean |x_{i+1} − x_i|

    It is 1 on average where nothing marks the edge, and for photographs about 2 to 10.

    Args:
        images: `[B, H, W, C]`.
        axes: a name in `diffjax.models.layers.seamless.AXES`: which edges.

    Example:
        >>> ramp = np.arange(8.0).reshape(1, 1, 8, 1).repeat(8, 1)
        >>> jump_at_edges(ramp, "x")
        7.0
    """
    across, inside = [], []
    for axis in AXES[axes]:
        inside.append(np.abs(np.diff(images, axis=axis)).mean())
        first, last = images.take(0, axis), images.take(-1, axis)
        across.append(np.abs(first - last).mean())
    return float(np.mean(across) / max(np.mean(inside), 1e-12))
