"""A discriminator of hidden tokens: its network, and the hinge loss that trains it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float

from diffjax.shapes import PerSample

DISCRIMINATOR = "discriminator"
"""The name of the discriminator's parameters, which training alone uses."""

Grid = Float[Array, " batch rows columns numbers"]
Logits = Float[Array, " batch rows columns"]


class Head(nn.Module):
    """How real an image is at each place, by the hidden tokens of a network that saw it.

    Call with tokens `[B, rows, columns, D]`; returns logits `[B, rows, columns]`. A layer of each
    token and one of its 3x3 neighbours, with a shortcut: StyleGAN-T's head (Sauer et al. 2023,
    arXiv:2301.09515) on a grid, without its spectral norm and statistics of the batch.
    """

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        width = tokens.shape[-1]
        h = nn.LayerNorm(name="norm")(tokens.astype(jnp.float32))
        h = nn.leaky_relu(nn.Conv(width, (1, 1), name="hidden")(h), 0.2)
        around = nn.leaky_relu(nn.Conv(width, (3, 3), name="around")(h), 0.2)
        return nn.Conv(1, (1, 1), name="out")((h + around) / jnp.sqrt(2.0))[..., 0]


def init_head(key: Array, width: int) -> Any:
    """The parameters of a head of tokens of this width."""
    return Head().init(key, jnp.zeros((1, 1, 1, width)))["params"]


def logits(head: Any, tokens: Grid) -> Logits:
    """The logits of a head with these parameters."""
    found: Any = Head().apply({"params": head}, tokens)
    return found


def hinge(real: Logits, fake: Logits) -> PerSample:
    """The loss of a discriminator, `max(0, 1 - real) + max(0, 1 + fake)`, means over places.

    Lim & Ye 2017 (arXiv:1705.02894).

    Example:
        >>> real, fake = jnp.full((1, 1, 2), 0.25), jnp.array([[[-3.0, 1.0]]])
        >>> hinge(real, fake).tolist()
        [1.75]
    """
    return jnp.mean(nn.relu(1.0 - real) + nn.relu(1.0 + fake), axis=(1, 2))


def gradient_penalty(head: Any, tokens: Grid) -> PerSample:
    """R1: the squared norm of the gradient of a head's logits by its tokens, `[B]`.

    Of the sum over places. Mescheder et al. 2018 (arXiv:1801.04406), equation 9, without the half.
    """
    slope = jax.grad(lambda x: jnp.sum(logits(head, x)))(tokens.astype(jnp.float32))
    return jnp.sum(jnp.square(slope), axis=(1, 2, 3))
