"""Qwen3: a transformer that reads a text from left to right, as an encoder of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import normal
from jaxtyping import Bool

from diffjax.models.layers.attention import masked
from diffjax.models.layers.common import Dense, compute_type
from diffjax.models.layers.norms import norm
from diffjax.models.layers.rotary import Rotation, rotate, rotation_of
from diffjax.models.text_states import TextStates, TokenIds, TokenMask
from diffjax.shapes import Array, Tokens


class Qwen3(nn.Module):
    """The states of each layer of texts, `ids [B, T], mask [B, T] -> TextStates`; none is pooled.

        h_i = h + mlp(norm h)        h = h_{i-1} + attention(norm h_{i-1})

    A token attends to itself and those before it, with rotary positions and normalised queries and
    keys, of which several heads of queries share one (grouped queries). Norms are RMS norms, MLPs
    are gated by SiLU, and layers have no biases. Padding, where `mask` is false, is not attended
    to. What follows the states, probabilities of the next token, is left out.

    Attributes:
        width: the width of a token; 2,560 in 4B.
        depth: the number of blocks; 36 in 4B and 8B.
        num_heads: the number of heads of queries; 32.
        num_key_heads: the number of heads of keys and of values, which divides that of queries; 8.
        head_width: the width of a head; 128. Heads need not have the width of a token together.
        mlp_width: the number of hidden units of an MLP; 9,728 in 4B.
        vocabulary: the number of tokens; 151,936.
        max_period: the longest period of the rotation, over 2π; 10⁶.
        epsilon: ε of the norms; 1e-6.
        dtype: the compute type of the branches; their sum stays in float32.

    References:
        Qwen Team, "Qwen3 Technical Report", 2025, arXiv:2505.09388
        Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
        Checkpoints", 2023, arXiv:2305.13245
    """

    width: int = 2560
    depth: int = 36
    num_heads: int = 32
    num_key_heads: int = 8
    head_width: int = 128
    mlp_width: int = 9728
    vocabulary: int = 151_936
    max_period: float = 1e6
    epsilon: float = 1e-6
    dtype: str = "float32"

    @nn.compact
    def __call__(self, ids: TokenIds, mask: TokenMask | None = None) -> TextStates:
        batch, tokens = ids.shape
        table = nn.Embed(self.vocabulary, self.width, embedding_init=normal(0.02), name="tokens")
        places = np.arange(tokens, dtype=np.float64)[:, None]
        rotation = rotation_of(places, (self.head_width,), self.max_period)
        sees = jnp.tri(tokens, dtype=bool)[None, None]
        if mask is not None:
            sees = sees & mask[:, None, None]
        hidden = [table(ids).astype(jnp.float32)]
        for i in range(self.depth):
            block = _Block(
                (self.num_heads, self.num_key_heads, self.head_width),
                self.mlp_width,
                self.epsilon,
                self.dtype,
                name=f"block_{i}",
            )
            hidden.append(block(hidden[-1], sees, rotation))
        final = norm("rms", jnp.float32, self.epsilon, name="norm")
        nothing = jnp.zeros((batch, 0), jnp.float32)
        return TextStates(tuple(hidden), tuple(final(x) for x in hidden), nothing)


class _Block(nn.Module):
    """A block: `x + attention(norm x)`, then `x + mlp(norm x)`."""

    heads: tuple[int, int, int]
    mlp_width: int
    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: Tokens, sees: Bool[Array, "..."], rotation: Rotation) -> Tokens:
        dtype = compute_type(self.dtype)
        num_heads, num_key_heads, width = self.heads
        normed = norm("rms", dtype, self.epsilon, name="norm1")(x)
        q, k, v = (
            self._dense(normed, count * width, name).reshape(*x.shape[:2], count, width)
            for name, count in (("q", num_heads), ("k", num_key_heads), ("v", num_key_heads))
        )
        q, k = (
            rotate(norm("rms", dtype, self.epsilon, name=f"{name}_norm")(part), rotation)
            for name, part in (("q", q), ("k", k))
        )
        k, v = (jnp.repeat(part, num_heads // num_key_heads, axis=2) for part in (k, v))
        attended = masked(q, k, v, sees).reshape(*x.shape[:2], -1)
        x = x + self._dense(attended, x.shape[-1], "out").astype(x.dtype)
        normed = norm("rms", dtype, self.epsilon, name="norm2")(x)
        gate = nn.silu(self._dense(normed, self.mlp_width, "gate"))
        hidden = gate * self._dense(normed, self.mlp_width, "up")
        return x + self._dense(hidden, x.shape[-1], "down").astype(x.dtype)

    def _dense(self, x: jax.Array, features: int, name: str) -> jax.Array:
        dtype = compute_type(self.dtype)
        return Dense(features, use_bias=False, dtype=dtype, kernel_init=normal(0.02), name=name)(x)
