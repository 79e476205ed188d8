"""A transformer block that attends to its own tokens and to those of the condition."""

import flax.linen as nn
from jax.nn import initializers

from diffjax.conditions import TokenStates
from diffjax.models.layers.common import SelfAttention, compute_type
from diffjax.models.layers.context import CrossAttention
from diffjax.models.layers.mlps import GEGLU
from diffjax.models.layers.norms import norm
from diffjax.shapes import Tokens


class TransformerBlock(nn.Module):
    """Self-attention, attention to the condition's tokens, and a gated MLP, each after a norm.

        x ← x + attention(norm₁(x))
        x ← x + cross_attention(norm₂(x), tokens)
        x ← x + mlp(norm₃(x))                          mlp(h) = down(GELU(gate(h)) · up(h))

    Queries, keys and values have no biases. Rombach et al. 2022 (arXiv:2112.10752), appendix E.2.1.

    Attributes:
        num_heads: the number of heads; divides the width D of the tokens.
        dtype: the compute type.
        attention: `"auto"` or a name in `diffjax.models.layers.attention.IMPLEMENTATIONS`, of the
            self-attention.
    """

    num_heads: int
    dtype: str = "float32"
    attention: str = "auto"

    @nn.compact
    def __call__(self, x: Tokens, context: TokenStates) -> Tokens:
        look = SelfAttention(
            self.num_heads,
            self.attention,
            self.dtype,
            qkv_bias=False,
            out_init=initializers.zeros,
            name="attention",
        )
        cross = CrossAttention(
            self.num_heads, self.dtype, null_token=False, qkv_bias=False, name="cross_attention"
        )
        mlp = GEGLU(4 * x.shape[-1], self.dtype, name="mlp")
        x = x + look(self._norm(x, "norm_1"))
        x = x + cross(self._norm(x, "norm_2"), context)
        return x + mlp(self._norm(x, "norm_3"))

    def _norm(self, x: Tokens, name: str) -> Tokens:
        return norm("layer", compute_type(self.dtype), 1e-5, True, name)(x)
