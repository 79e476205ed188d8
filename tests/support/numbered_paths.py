"""Several paths in one compiled program: which of them is walked is a number in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.process.paths import Path


def numbered(paths: Sequence[Path]) -> Callable[[Array | int], Path]:
    """`number -> path`, for programs that take the number and are compiled once for all paths."""

    def pick(number: Array, of: Callable[[Path], Array]) -> Array:
        return jnp.stack([jnp.asarray(of(path)) for path in paths])[number]

    @register_dataclass
    @dataclass(frozen=True)
    class Numbered:
        number: Array

        @property
        def t_min(self) -> Array:
            return pick(self.number, lambda path: path.t_min)

        @property
        def t_noise(self) -> Array:
            return pick(self.number, lambda path: path.t_noise)

        def alpha(self, t: Array) -> Array:
            return pick(self.number, lambda path: path.alpha(t))

        def sigma(self, t: Array) -> Array:
            return pick(self.number, lambda path: path.sigma(t))

    return lambda number: Numbered(jnp.asarray(number))
