"""BERT: a transformer that is normalised after each branch; MiniLM is one."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal
from jaxtyping import Bool

from diffjax.models.layers.common import SelfAttention, compute_type
from diffjax.models.layers.norms import norm
from diffjax.models.text_states import TextStates, TokenIds, TokenMask, check_length
from diffjax.models.vit import gelu
from diffjax.shapes import Array, Tokens


class Bert(nn.Module):
    """The states of each layer and their mean, `ids [B, T], mask [B, T] -> TextStates`.

        h_i = norm(h + mlp(h))        h = norm(h_{i-1} + attention(h_{i-1}))
        pooled = mean of h_n over the tokens

    Padding, where `mask` is false, is neither attended to nor pooled. States are normalised in
    each layer, so `normed` is `hidden`. The vector of BERT's own first token is left out.

    In RoBERTa positions count from `first_position`, and padding has the position before it. With
    `num_features` the mean is projected, as in the multilingual CLIP of Kandinsky 2.1.

    Attributes:
        width: the width of a token; 384 in MiniLM, 768 in BERT base.
        depth: the number of blocks; 6 in MiniLM L6, 12 in BERT base.
        num_heads: the number of attention heads; 12.
        vocabulary: the number of tokens; 30,522.
        length: the largest number of tokens; 512.
        mlp_width: the width between the layers of an MLP; 4 times `width` by default.
        num_segments: the number of embeddings of segments, of which the first one is used; 2.
        epsilon: ε of the norms; 1e-12.
        first_position: that of the first token; 0, and 2 in RoBERTa.
        num_features: the width of the projected mean; 0 for the mean itself.
        dtype: the compute type of the branches; the outputs are float32.

    References:
        Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
        Understanding", 2018, arXiv:1810.04805
        Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
        Pre-Trained Transformers", 2020, arXiv:2002.10957
        Reimers & Gurevych, "Sentence-BERT", 2019, arXiv:1908.10084
        Conneau et al., "Unsupervised Cross-lingual Representation Learning at Scale", 2019,
        arXiv:1911.02116
        Carlsson et al., "Cross-lingual and Multilingual CLIP", LREC 2022
    """

    width: int = 384
    depth: int = 6
    num_heads: int = 12
    vocabulary: int = 30_522
    length: int = 512
    mlp_width: int | None = None
    num_segments: int = 2
    epsilon: float = 1e-12
    first_position: int = 0
    num_features: int = 0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, ids: TokenIds, mask: TokenMask | None = None) -> TextStates:
        tokens = ids.shape[1]
        mask = jnp.ones(ids.shape, bool) if mask is None else mask
        check_length(tokens, self.length)
        x = nn.Embed(self.vocabulary, self.width, embedding_init=normal(0.02), name="tokens")(ids)
        shape = (self.length + self.first_position, self.width)
        positions = self.param("positions", normal(0.02), shape, jnp.float32)
        segments = self.param(
            "segments", normal(0.02), (self.num_segments, self.width), jnp.float32
        )
        placed = positions[None, :tokens]
        if self.first_position:
            counted = jnp.cumsum(mask, axis=1) * mask
            placed = positions[counted + self.first_position - 1]
        x = x.astype(jnp.float32) + placed + segments[None, :1]
        hidden = [_norm(self.epsilon, "norm")(x)]
        for i in range(self.depth):
            block = _Block(
                self.num_heads,
                self.mlp_width or 4 * self.width,
                self.epsilon,
                self.dtype,
                name=f"block_{i}",
            )
            hidden.append(block(hidden[-1], mask[:, None, None]))
        kept = mask[..., None].astype(jnp.float32)
        # One token at least, so that a text without any has a vector of zeros.
        pooled = (hidden[-1] * kept).sum(1) / jnp.maximum(kept.sum(1), 1.0)
        if self.num_features:
            pooled = nn.Dense(self.num_features, dtype=jnp.float32, name="projection")(pooled)
        return TextStates(tuple(hidden), tuple(hidden), pooled)


class MultilingualCLIP(Bert):
    """The multilingual text encoder of Kandinsky 2.1: an XLM-RoBERTa with a projection.

    Carlsson et al., "Cross-lingual and Multilingual CLIP", LREC 2022.
    """

    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    vocabulary: int = 250_002
    num_segments: int = 1
    epsilon: float = 1e-5
    first_position: int = 2
    num_features: int = 768


class _Block(nn.Module):
    """A block: `norm(x + attention(x))`, then `norm(x + mlp(x))`."""

    num_heads: int
    mlp_width: int
    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: Tokens, mask: Bool[Array, "..."]) -> Tokens:
        width, dtype = x.shape[-1], compute_type(self.dtype)
        attention = SelfAttention(self.num_heads, dtype=self.dtype, name="attention")
        attended = attention(x.astype(dtype), mask=mask)
        x = _norm(self.epsilon, "norm1")(x + attended.astype(x.dtype))
        hidden = gelu(nn.Dense(self.mlp_width, dtype=dtype, name="up")(x.astype(dtype)))
        hidden = nn.Dense(width, dtype=dtype, name="down")(hidden)
        return _norm(self.epsilon, "norm2")(x + hidden.astype(x.dtype))


def _norm(epsilon: float, name: str) -> Callable[[jax.Array], jax.Array]:
    return norm("layer", jnp.float32, epsilon, True, name, use_fast_variance=False)
