"""Rematerialisation: which activations a block keeps, and which its gradient computes again."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax import lax

from diffjax.errors import UserError, nearest

ATTENTION = "attention"
"""The name (`jax.ad_checkpoint.checkpoint_name`) of the output of attention in all networks."""

Policy = Callable[..., Any]

_named = jax.checkpoint_policies.save_only_these_names(ATTENTION)


def _products(primitive: Any, *inputs: Any, **how: Any) -> bool:
    """Keeps results of matrix products, of convolutions and of attention."""
    product = primitive in (lax.dot_general_p, lax.conv_general_dilated_p)
    return product or _named(primitive, *inputs, **how)


def _dense(primitive: Any, *inputs: Any, **how: Any) -> bool:
    """Like `_products`, without products of two activations: attention's `[T, T]` logits."""
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
"""Policies by name, from the most memory to the least. Beside its input, a block keeps

- `none`: everything that its gradient needs, as without rematerialisation;
- `products`: the results of matrix products and convolutions, so none of them is computed again;
- `dense`: the same without attention's logits `[T, T]`;
- `attention`: the output of attention alone;
- `full`: nothing, so the whole block is computed twice.
"""


def rematerialised(block: type[nn.Module], name: str, **how: Any) -> Any:
    """A class of blocks with the rematerialisation policy `REMAT[name]`.

    Values, gradients and the names of the parameters do not change.

    Args:
        block: the class of the module, whose `__call__` is computed again for gradients.
        name: a name in `REMAT`.
        **how: further arguments of `flax.linen.remat`.

    Raises:
        UserError: the name is unknown; the nearest known one is in the message.

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
