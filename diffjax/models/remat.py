"""Rematerialisation: what a block keeps of its forward pass, and computes again in the backward."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax import lax

from diffjax.errors import UserError, nearest

ATTENTION = "attention"
"""The name (`jax.ad_checkpoint.checkpoint_name`) of what attention gives, in every network."""

Policy = Callable[..., Any]

_named = jax.checkpoint_policies.save_only_these_names(ATTENTION)


def _products(primitive: Any, *inputs: Any, **how: Any) -> bool:
    """Matrix products, convolutions, and what attention's own kernels give."""
    product = primitive in (lax.dot_general_p, lax.conv_general_dilated_p)
    return product or _named(primitive, *inputs, **how)


def _dense(primitive: Any, *inputs: Any, **how: Any) -> bool:
    """The same without products of two activations, which are attention's `[T, T]` logits."""
    if primitive is lax.dot_general_p:
        _, (left, _) = how["dimension_numbers"]
        return not left
    return _products(primitive, *inputs, **how)


REMAT: dict[str, Policy | None] = {
    "none": None,
    "products": _products,
    "dense": _dense,
    "attention": _named,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""By name, from what keeps most to what keeps least. Beside its input a block keeps

- `none`: whatever its gradient reads, which is what XLA would do anyway;
- `products`: results of matrix products and convolutions, so none of them is computed again;
- `dense`: the same but for attention's logits `[T, T]`;
- `attention`: what attention gives, alone;
- `full`: nothing, so the whole block is computed twice.
"""


def rematerialised(block: type[nn.Module], name: str, **how: Any) -> Any:
    """A class of blocks that keep what `REMAT[name]` says.

    Value and gradient are the same, and so are the names of the parameters.

    Args:
        block: class of the module; its `__call__` is what is computed again.
        name: in `REMAT`.
        **how: further arguments of `flax.linen.remat`.

    Raises:
        UserError: for an unknown name, with the nearest known one.

    Example:
        >>> rematerialised(nn.Dense, "none") is nn.Dense
        True

    References:
        Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv:1604.06174
    """
    if name not in REMAT:
        raise UserError(f"remat: no policy {name!r}; {nearest(name, REMAT)}")
    policy = REMAT[name]
    return block if policy is None else nn.remat(block, policy=policy, **how)
