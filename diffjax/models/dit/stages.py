"""Stages: blocks one after the other over the same tokens, separate or stacked."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.models.layers.common import STACKED


class Stage(NamedTuple):
    """The blocks from number `start` up to `stop`, that one excluded.

    Example:
        >>> Stage(0, 12).stack, Stage(4, 12).stack
        ('blocks', 'blocks_4')
    """

    start: int
    stop: int

    @property
    def stack(self) -> str:
        """The name of its parameters where they are stacked."""
        return f"{STACKED}_{self.start}" if self.start else STACKED

    @property
    def blocks(self) -> list[str]:
        """The names of its blocks where they are not stacked."""
        return [f"block_{i}" for i in range(self.start, self.stop)]


def stages_of(depth: int, *starts: int) -> list[Stage]:
    """The stages of a network of `depth` blocks, of which one begins at each of `starts`.

    Example:
        >>> stages_of(12), stages_of(12, 4)
        ([Stage(start=0, stop=12)], [Stage(start=0, stop=4), Stage(start=4, stop=12)])
    """
    edges = sorted({0, *(start for start in starts if 0 < start < depth), depth})
    return [Stage(start, stop) for start, stop in itertools.pairwise(edges)]


def sown_blocks(depth: int, hidden_depths: Sequence[int]) -> list[int]:
    """The blocks whose tokens are sown, in increasing order.

    Args:
        depth: the number of blocks.
        hidden_depths: the numbers of blocks after which tokens are sown, from 1; without any it is
            a quarter of the blocks.

    Example:
        >>> sown_blocks(12, (8, 4)), sown_blocks(12, ())
        ([3, 7], [2])
    """
    return sorted(number - 1 for number in hidden_depths) or [(depth - 1) // 4]


def stack_blocks(params: dict[str, Any], *starts: int) -> dict[str, Any]:
    """Converts the parameters of a `DiT` to those of the same network with `scan=True`.

    Args:
        params: parameters with a `block_i` for each block.
        *starts: the numbers of the blocks that begin a stage (`DiT.stages`), if there are several.

    Example:
        >>> import jax.numpy as jnp
        >>> stack_blocks({"block_0": {"w": jnp.zeros(2)}, "block_1": {"w": jnp.ones(2)}, "end": 1})
        {'end': 1, 'blocks': {'w': Array([[0., 0.], [1., 1.]], dtype=float32)}}
    """
    rest = {name: value for name, value in params.items() if not name.startswith("block_")}
    stages = stages_of(len(params) - len(rest), *starts)
    return rest | {
        stage.stack: jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(params[name] for name in stage.blocks)
        )
        for stage in stages
    }


def unstack_blocks(params: dict[str, Any], *starts: int) -> dict[str, Any]:
    """Converts the parameters of a `DiT` with `scan=True` to those without: inverts `stack_blocks`.

    Example:
        >>> import jax.numpy as jnp
        >>> list(unstack_blocks({"blocks": {"w": jnp.zeros((2, 3))}}))
        ['block_0', 'block_1']
    """
    blocks = {}
    for start in sorted({0, *starts}):
        stack = params[Stage(start, start).stack]
        depth = jax.tree.leaves(stack)[0].shape[0]
        for i, name in enumerate(Stage(start, start + depth).blocks):
            blocks[name] = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
    rest = {name: value for name, value in params.items() if not name.startswith(STACKED)}
    return rest | blocks
