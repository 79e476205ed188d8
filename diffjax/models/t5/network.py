"""The encoder of T5: a transformer with a learned bias for each distance of two tokens."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import normal
from jaxtyping import Bool, Float

from diffjax.models.layers.attention import masked
from diffjax.models.layers.common import Dense, compute_type
from diffjax.models.layers.norms import norm
from diffjax.models.text_states import TextStates, TokenIds, TokenMask
from diffjax.shapes import Array, Tokens


class T5Encoder(nn.Module):
    """The states of each layer of texts, `ids [B, T], mask [B, T] -> TextStates`; none is pooled.

        h_i = h + mlp(norm h)        h = h_{i-1} + attention(norm h_{i-1})
        attention: softmax(q kᵀ + bias[bucket(j - i)]) v        without the factor 1/√d

    Norms are RMS norms. T may be any number; distances of `max_distance` or more share a bucket.
    Padding, where `mask` is false, is not attended to. Layers have no biases.

    The sum h of all branches stays in float32, since its numbers reach 10⁴ and more in large T5:
    too many for float16, and coarse in bfloat16.

    Attributes:
        width: the width of a token; 4,096 in XXL.
        depth: the number of blocks; 24 in XXL.
        num_heads: the number of attention heads; 64 in XXL.
        mlp_width: the width between the layers of an MLP; 10,240 in XXL.
        gated: whether the MLP is `down(gelu(gate x) · up x)`, as in T5 1.1; else
            `down(relu(up x))`, as in T5 1.0.
        head_width: the width of a head; 64, and 128 in 3B and 11B of T5 1.0. Heads need not have
            the width of a token together.
        vocabulary: the number of tokens; 32,128.
        num_buckets: the number of buckets of distances, half of them for each direction; 32.
        max_distance: 128.
        epsilon: ε of the norms; 1e-6.
        dtype: the compute type of the branches; bfloat16 or float32.

    References:
        Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
        Transformer", 2020, arXiv:1910.10683
        Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202
    """

    width: int = 4096
    depth: int = 24
    num_heads: int = 64
    mlp_width: int = 10_240
    gated: bool = True
    head_width: int = 64
    vocabulary: int = 32_128
    num_buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
    dtype: str = "float32"

    @nn.compact
    def __call__(self, ids: TokenIds, mask: TokenMask | None = None) -> TextStates:
        batch, tokens = ids.shape
        table = nn.Embed(self.vocabulary, self.width, embedding_init=normal(1.0), name="tokens")
        biases = self.param(
            "distances",
            normal(self.width**-0.5),
            (self.num_buckets, self.num_heads),
            jnp.float32,
        )
        places = np.arange(tokens)
        buckets = bucket(places[None] - places[:, None], self.num_buckets, self.max_distance)
        bias = biases[buckets].transpose(2, 0, 1)[None].astype(jnp.float32)
        sees = jnp.ones((batch, tokens), bool) if mask is None else mask
        hidden = [table(ids).astype(jnp.float32)]
        for i in range(self.depth):
            block = _Block(
                self.num_heads,
                self.head_width,
                self.mlp_width,
                self.gated,
                self.epsilon,
                self.dtype,
                name=f"block_{i}",
            )
            hidden.append(block(hidden[-1], sees[:, None, None], bias))
        final = norm("rms", jnp.float32, self.epsilon, name="norm")
        nothing = jnp.zeros((batch, 0), jnp.float32)
        return TextStates(tuple(hidden), tuple(final(x) for x in hidden), nothing)


class _Block(nn.Module):
    """A block: `x + attention(norm x)`, then `x + mlp(norm x)`."""

    num_heads: int
    head_width: int
    mlp_width: int
    gated: bool
    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: Tokens, mask: Bool[Array, "..."], bias: Float[Array, "..."]) -> Tokens:
        dtype = compute_type(self.dtype)
        normed = norm("rms", dtype, self.epsilon, name="norm1")(x)
        qkv = self._dense(normed, 3 * self.num_heads * self.head_width, "qkv")
        heads = (*x.shape[:2], self.num_heads, self.head_width)
        q, k, v = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))
        attended = masked(q, k, v, mask, bias, scale=1.0).reshape(*x.shape[:2], -1)
        x = x + self._dense(attended, x.shape[-1], "out").astype(x.dtype)
        normed = norm("rms", dtype, self.epsilon, name="norm2")(x)
        hidden = self._dense(normed, self.mlp_width, "up")
        if self.gated:
            gate = nn.gelu(self._dense(normed, self.mlp_width, "gate"), approximate=True)
            hidden = gate * hidden
        else:
            hidden = nn.relu(hidden)
        return x + self._dense(hidden, x.shape[-1], "down").astype(x.dtype)

    def _dense(self, x: jax.Array, features: int, name: str) -> jax.Array:
        init = normal(x.shape[-1] ** -0.5)
        dtype = compute_type(self.dtype)
        return Dense(features, use_bias=False, dtype=dtype, kernel_init=init, name=name)(x)


def bucket(distance: np.ndarray, num_buckets: int = 32, max_distance: int = 128) -> np.ndarray:
    """The bucket of a distance of two tokens, of the key's place minus the query's.

    Of n buckets for each direction, the first n/2 are one distance each, and the others grow
    geometrically up to `max_distance`. Distances to tokens that come after the query have the
    second half of the buckets.

    Example:
        >>> bucket(np.array([0, -1, 1, -7, -8, -100, -128, -1000])).tolist()
        [0, 1, 17, 7, 8, 15, 15, 15]
    """
    half = num_buckets // 2
    exact, far = half // 2, np.abs(distance)
    # In float32, as the published networks were trained: a boundary depends on it.
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact))
    growing = exact + (ratio / np.float32(math.log(max_distance / exact)) * (half - exact)).astype(
        int
    )
    return half * (distance > 0) + np.where(far < exact, far, np.minimum(growing, half - 1))
