"""Paths as one path that has a number, so that one compiled program serves them all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.process.paths import Path


@register_dataclass
@dataclass(frozen=True)
class AnyPath:
    """The path `some[which]`; its number and its ends may be traced.

    The scales of all are computed and one is taken.
    """

    which: Any
    t_min: Any
    t_noise: Any
    some: tuple[Path, ...] = field(metadata={"static": True})

    def alpha(self, t: Array) -> Array:
        return jnp.stack([path.alpha(t) for path in self.some])[self.which]

    def sigma(self, t: Array) -> Array:
        return jnp.stack([path.sigma(t) for path in self.some])[self.which]


def numbered(some: Mapping[str, Path]) -> dict[str, AnyPath]:
    """Each path as `AnyPath`, all of one structure."""
    return {
        name: AnyPath(
            np.int32(i), np.float64(path.t_min), np.float64(path.t_noise), tuple(some.values())
        )
        for i, (name, path) in enumerate(some.items())
    }
