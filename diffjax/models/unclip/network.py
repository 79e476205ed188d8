"""unCLIP's prior: a transformer that predicts the embedding of an image from a text."""

import flax.linen as nn
import jax.numpy as jnp
from jax.nn import initializers

from diffjax.conditions import TokenStates
from diffjax.errors import UserError
from diffjax.kinds import Positive
from diffjax.models.layers.common import Conditioning, Dense, compute_type
from diffjax.models.layers.norms import norm
from diffjax.models.vit import Block, gelu
from diffjax.shapes import Images, NoiseLabels


class UnclipPrior(nn.Module):
    """A transformer over a text, the noise label and a noisy embedding of an image.

        tokens = [W states, W' pooled, noise label, W'' x, query] + positions

    A token attends to itself and those before it, but for padding of the text; the prediction is
    read from the last one, a learned query. An embedding is an image of one pixel, so objectives,
    solvers and guidance see nothing new.

    Call with `x [B, 1, 1, D]`, `noise_label [B]` and `TokenStates` of the text by CLIP, whose
    pooled vector is the text's embedding; returns `[B, 1, 1, D]` float32.

    What it predicts are standardised embeddings. Their mean and deviation are parameters, `mean`
    and `std`, which the network does not use (`diffjax.codecs.embeddings`).

    Attributes:
        num_classes: 0; there are no labels.
        width: the width of a token; 2048.
        depth: the number of blocks; 20.
        num_heads: the number of attention heads; 32.
        length: the number of tokens of a text; 77.
        dtype: the compute type of the branches.

    Raises:
        UserError: the condition is no text, or one of another length.

    Example:
        >>> import jax
        >>> from diffjax.conditions import Tokens
        >>> net = UnclipPrior(0, width=16, depth=1, num_heads=2, length=5)
        >>> x, t, text = jnp.ones((2, 1, 1, 12)), jnp.ones(2), Tokens(5, 12, 12).example(2)
        >>> jax.eval_shape(net.init_with_output, jax.random.key(0), x, t, text)[0].shape
        (2, 1, 1, 12)

    References:
        Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents", 2022,
        arXiv:2204.06125, section 2.2
    """

    num_classes: int = 0
    width: Positive[int] = 2048
    depth: Positive[int] = 20
    num_heads: Positive[int] = 32
    length: Positive[int] = 77
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Images, noise_label: NoiseLabels, cond: TokenStates, train: bool = False
    ) -> Images:
        del train
        if not isinstance(cond, TokenStates) or cond.states.shape[1] != self.length:
            raise UserError(f"this prior takes the states of a text of {self.length} tokens")
        batch, features, dtype = x.shape[0], x.shape[-1], compute_type(self.dtype)
        time = Conditioning(
            0, self.width, num_frequencies=self.width, dtype=self.dtype, name="conditioning"
        )(noise_label, None).vector
        # Declared to be kept with the weights.
        self.param("mean", initializers.zeros, (features,))
        self.param("std", initializers.ones, (features,))
        query = self.param("query", initializers.zeros, (self.width,), jnp.float32)
        alone = {
            "pooled": Dense(self.width, dtype=dtype, name="pooled")(cond.pooled),
            "time": time,
            "embedding": Dense(self.width, dtype=dtype, name="embedding")(x.reshape(batch, -1)),
            "query": jnp.broadcast_to(query, (batch, self.width)),
        }
        text = Dense(self.width, dtype=dtype, name="text")(cond.states)
        h = jnp.concatenate([text, jnp.stack([*alone.values()], axis=1)], axis=1)
        count = h.shape[1]
        positions = self.param(
            "positions", initializers.normal(0.01), (count, self.width), jnp.float32
        )
        shown = jnp.concatenate([cond.mask, jnp.ones((batch, len(alone)), bool)], axis=1)
        mask = shown[:, None, None] & jnp.tri(count, dtype=bool)[None, None]
        h = h.astype(jnp.float32) + positions[None]
        for i in range(self.depth):
            h = Block(self.num_heads, 1e-5, gelu, dtype=self.dtype, name=f"block_{i}")(h, mask)
        last = norm("layer", dtype, 1e-5, True, "norm", use_fast_variance=False)(h[:, -1])
        out = Dense(features, dtype=dtype, kernel_init=initializers.zeros, name="out")(last)
        return out.reshape(x.shape).astype(jnp.float32)
