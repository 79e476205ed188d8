"""The text encoder of CLIP: a transformer whose tokens attend to those before them."""

import flax.linen as nn
import jax.numpy as jnp

from diffjax.errors import UserError, nearest
from diffjax.models.layers.norms import norm
from diffjax.models.text_states import TextStates, TokenIds, TokenMask, check_length
from diffjax.models.vit import ACTIVATIONS, Block


class ClipText(nn.Module):
    """The states of each layer and the pooled vector of texts, `ids [B, T] -> TextStates`.

        h_0 = E[ids] + positions        h_i = block_i(h_{i-1})        pooled = W norm(h_n)[end]

    A token attends to itself and those before it. `end` is the place of the end of the text. T may
    be smaller than `length`. An id outside of the vocabulary returns NaN. Call it with
    `mask [B, T]`, true where there is a token, to hide padding too; published diffusion models do
    not.

    Attributes:
        width: the width of a token; 768 (CLIP L), 1024 (H), 1280 (bigG).
        depth: the number of blocks; 12 (L), 24 (H), 32 (bigG).
        num_heads: the number of attention heads, of width 64 each.
        num_features: the width of the projected vector; 0 for the state itself, as in Stable
            Diffusion 1.
        vocabulary: the number of tokens; 49,408.
        length: the largest number of tokens; 77.
        mlp_width: the width between the layers of an MLP; 4 times `width` by default.
        activation: the nonlinearity, a name in `ACTIVATIONS`; `quick_gelu` in CLIP L, `gelu` in
            OpenCLIP.
        epsilon: ε of the norms.
        end: the token at the end of a text, of which the first counts; None for the largest id in
            each text, which is the same in the published vocabulary, where the end has the largest.
        dtype: the compute type of the blocks; their sum and the outputs are float32.

    References:
        Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
        2021, arXiv:2103.00020
        Cherti et al., "Reproducible scaling laws for contrastive language-image learning", 2022,
        arXiv:2212.07143
    """

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    num_features: int = 0
    vocabulary: int = 49_408
    length: int = 77
    mlp_width: int | None = None
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    end: int | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, ids: TokenIds, mask: TokenMask | None = None) -> TextStates:
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"activation: none is called {self.activation!r}; "
                f"{nearest(self.activation, ACTIVATIONS)}"
            )
        batch, tokens = ids.shape
        check_length(tokens, self.length)
        table = nn.Embed(
            self.vocabulary, self.width, embedding_init=nn.initializers.normal(0.02), name="tokens"
        )
        positions = self.param(
            "positions", nn.initializers.normal(0.01), (self.length, self.width), jnp.float32
        )
        sees = jnp.tri(tokens, dtype=bool)[None, None]
        if mask is not None:
            sees = sees & mask[:, None, None]
        # Weights may be stored in half precision; sums are not.
        hidden = [table(ids).astype(jnp.float32) + positions[None, :tokens].astype(jnp.float32)]
        for i in range(self.depth):
            block = Block(
                self.num_heads,
                self.epsilon,
                ACTIVATIONS[self.activation],
                mlp_width=self.mlp_width,
                dtype=self.dtype,
                name=f"block_{i}",
            )
            hidden.append(block(hidden[-1], sees))
        final = norm("layer", jnp.float32, self.epsilon, True, "norm", use_fast_variance=False)
        normed = tuple(final(x) for x in hidden)
        end = ids.argmax(1) if self.end is None else (ids == self.end).argmax(1)
        pooled = normed[-1][jnp.arange(batch), end]
        if self.num_features:
            pooled = nn.Dense(
                self.num_features, use_bias=False, dtype=jnp.float32, name="projection"
            )(pooled)
        return TextStates(tuple(hidden), normed, pooled)
