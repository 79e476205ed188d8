"""Normalisations of tokens, by name."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from diffjax.errors import UserError, nearest


def _layer(affine: bool, **how: Any) -> nn.Module:
    return nn.LayerNorm(use_bias=affine, use_scale=affine, **how)


def _rms(affine: bool, **how: Any) -> nn.Module:
    return nn.RMSNorm(**how)


NORMS: Mapping[str, Callable[..., nn.Module]] = {"layer": _layer, "rms": _rms}
"""Norms by name:

- `layer`: `(x - mean x) / √(var x + ε)`, followed by a learned affine map where nothing else
  follows (Ba et al. 2016, arXiv:1607.06450);
- `rms`: `scale · x / √(mean x² + ε)` with a learned `scale` (Zhang & Sennrich 2019,
  arXiv:1910.07467).
"""


def norm(
    kind: str,
    dtype: Any,
    epsilon: float = 1e-6,
    affine: bool = False,
    name: str | None = None,
    **how: Any,
) -> Callable[[jax.Array], jax.Array]:
    """A norm over the last axis, to be called within a module.

    Args:
        kind: a name in `NORMS`.
        dtype: the type of the result; means are computed in float32.
        epsilon: `ε`; 1e-6 in DiT.
        affine: whether a layer norm has a learned scale and bias of its own.
        name: the name of its parameters.
        **how: further arguments of the module.

    Raises:
        UserError: no norm has this name; the nearest known one is in the message.

    Example:
        >>> norm("rsm", "float32")
        Traceback (most recent call last):
        ...
        diffjax.errors.UserError: norm: no norm 'rsm'; did you mean 'rms'?
    """
    if kind not in NORMS:
        raise UserError(f"norm: no norm {kind!r}; {nearest(kind, NORMS)}")
    module: Any = NORMS[kind](affine, epsilon=epsilon, dtype=dtype, name=name, **how)

    def normalised(x: jax.Array) -> jax.Array:
        # Flax promotes half precision implicitly, which a user's flags may refuse.
        with jax.numpy_dtype_promotion("standard"):
            return module(x)

    return normalised
