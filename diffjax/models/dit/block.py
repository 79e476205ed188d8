"""One block of the diffusion transformer."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Bool, Float

from diffjax.conditions import TokenStates
from diffjax.errors import UserError, nearest
from diffjax.models.layers.common import Dense, SelfAttention, compute_type
from diffjax.models.layers.context import CrossAttention
from diffjax.models.layers.mlps import MLPS
from diffjax.models.layers.norms import norm
from diffjax.models.layers.placement import BATCH, constrain, of_whole_groups
from diffjax.models.layers.rotary import Rotation
from diffjax.shapes import Array, OneKey, Tokens

TOKENS = (BATCH, "sequence", None)
"""The sharding of tokens `[B, T, D]` between layers: whole vectors, as layer norms need them."""


class Given(NamedTuple):
    """What all blocks of a stage take beside the tokens.

    Attributes:
        conditioning: what modulates them, a vector for each image or each token; None if nothing
            does.
        context: token states to which they attend.
        rotation: the rotation of queries and keys, by the positions of the tokens.
    """

    conditioning: Float[Array, " batch width"] | Tokens | None = None
    context: TokenStates | None = None
    rotation: Rotation | None = None


class Own(NamedTuple):
    """The inputs that differ between blocks; for stacked blocks each has a first axis of blocks.

    Attributes:
        key: the random key for dropout.
        place: the one-hot number of a stacked block in its stack.
        skip: the tokens that an earlier block returned, over a long skip.
    """

    key: OneKey | None = None
    place: Bool[Array, " depth"] | None = None
    skip: Tokens | None = None


class DiTBlock(nn.Module):
    """A DiT block: attention and MLP, each with a modulated norm and a gate that is initially 0.

        x ← x + g₁ · attention(norm(x)·(1 + s₁) + b₁)
        x ← x + g₂ · mlp(norm(x)·(1 + s₂) + b₂)        (b₁, s₁, g₁, b₂, s₂, g₂) = W SiLU(c)

    Without a conditioning `c` the block is that of a vision transformer, `g = 1` and `s = b = 0`.
    With token states as context, cross-attention comes between the two: `x ← x + cross(norm(x))`.
    Over a long skip `x ← W [x, skip]` comes first.

    Call with tokens `[B, T, D]`, `Given` and `Own`; returns `[B, T, D]`. The attributes are those
    of `DiT`, and `hidden_scale`, the factor of initial weights that do not know the width.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    dtype: str = "float32"
    attention: str = "auto"
    norm: str = "layer"
    norm_eps: float = 1e-6
    mlp: str = "gelu"
    mlp_bias: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    mlp_norm_eps: float = 1e-6
    base_head_width: int = 0
    hidden_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Tokens, given: Given, own: Own) -> Tokens:
        width, dtype, c = x.shape[-1], compute_type(self.dtype), given.conditioning
        # Without gates, layers begin smaller (Bao et al. 2022).
        small = initializers.normal(0.02 * self.hidden_scale)
        init = small if c is None else initializers.xavier_uniform()
        if own.skip is not None:
            both = jnp.concatenate([x, own.skip], axis=-1)
            x = Dense(width, dtype=dtype, kernel_init=init, name="skip")(both)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = [None] * 6
        if c is not None:
            layer = nn.Dense(
                6 * width, dtype=dtype, kernel_init=initializers.zeros, name="modulation"
            )
            modulation = modulation_of(layer, c)
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, axis=-1)
        drop = nn.Dropout(self.dropout, deterministic=own.key is None)
        key_1, key_2 = (None, None) if own.key is None else jax.random.split(own.key)

        h = modulate(self._norm(x, c is None, "norm_1", self.norm_eps), shift_1, scale_1)
        h = SelfAttention(
            self.num_heads,
            self.attention,
            self.dtype,
            kernel_init=init,
            out_init=init,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            base_head_width=self.base_head_width,
            name="attention",
        )(h, own.place, given.rotation)
        x = x + gated(drop(h, rng=key_1), gate_1)
        if given.context is not None:
            cross = CrossAttention(
                self.num_heads,
                self.dtype,
                base_head_width=self.base_head_width,
                name="cross_attention",
            )
            x = x + cross(self._norm(x, c is None, "cross_norm", self.norm_eps), given.context)

        h = modulate(self._norm(x, c is None, "norm_2", self.mlp_norm_eps), shift_2, scale_2)
        if self.mlp not in MLPS:
            raise UserError(f"mlp: no MLP {self.mlp!r}; {nearest(self.mlp, MLPS)}")
        mlp = MLPS[self.mlp](
            int(width * self.mlp_ratio), self.dtype, self.mlp_bias, init, name="mlp"
        )
        return constrain(x + gated(drop(mlp(h), rng=key_2), gate_2), *TOKENS)

    def _norm(self, x: Tokens, affine: bool, name: str, epsilon: float) -> Tokens:
        return norm(self.norm, compute_type(self.dtype), epsilon, affine, name)(x)


def modulation_of(
    layer: Callable[[jax.Array], jax.Array], c: Float[Array, " batch width"] | Tokens
) -> jax.Array:
    """The modulation `layer(SiLU(c))`, of vectors `[B, D]` or of tokens `[B, T, D]`."""
    return of_whole_groups(layer, nn.silu(c)) if c.ndim == 2 else layer(nn.silu(c))


def modulate(x: Tokens, shift: jax.Array | None, scale: jax.Array | None) -> Tokens:
    """`x·(1 + scale) + shift`, of vectors `[B, D]` or of tokens; `x` without any."""
    if shift is None or scale is None:
        return x
    return x * (1 + _of_tokens(scale)) + _of_tokens(shift)


def gated(x: Tokens, gate: jax.Array | None) -> Tokens:
    """`gate·x`, of a vector `[B, D]` or of tokens; `x` without a gate."""
    return x if gate is None else _of_tokens(gate) * x


def _of_tokens(x: jax.Array) -> jax.Array:
    return x if x.ndim == 3 else x[:, None]
