"""Kandinsky 2's decoder: a `UNet` that sees the embedding of an image, and perhaps a text."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.conditions import TokenStates
from diffjax.kinds import NotNegative, Positive
from diffjax.models.layers.common import Dense, compute_type
from diffjax.models.layers.context import Parts
from diffjax.models.layers.norms import norm
from diffjax.models.unet import WITHOUT_NULL_ROW, Embedding, UNet

_NO_PARTS = Parts()


class KandinskyUNet(UNet):
    """A `UNet` with ADM's blocks whose self-attention also sees tokens of an image's embedding.

    The condition is `TokenStates`. The first token is the embedding e of an image, as a prior makes
    it of a text; in 2.1 the states of the text and their pooled vector follow, filled up with zeros
    to one width. The network attends to tokens

        norm(W e)                   2.2: `num_image_tokens` of them
        W e,  W' states             2.1

    and to the embedded noise label it adds

        norm(W e)                   2.2
        W e + norm(W' pooled)       2.1

    An inpainting network has a dict of the tokens and of images `[B, H, W, C + 1]`: the latents of
    the image that is kept, and a mask that is 1 where it is.

    Attributes:
        image_width: the width of the embedding; 768 (2.1) or 1280 (2.2).
        text_width: the width of a text's states; 0 is without a text, as in 2.2.
        num_image_tokens: the number of tokens that are made of the embedding; 10 or 32.
        context_width: the width of the tokens that are attended to; 768.

    Example:
        >>> from diffjax.conditions import Tokens
        >>> net = KandinskyUNet(
        ...     0, channels=32, channel_multipliers=(1, 2), token_levels=(1,), image_width=16
        ... )
        >>> x, t, embedding = jnp.ones((2, 8, 8, 4)), jnp.ones(2), Tokens(1, 16).example(2)
        >>> out, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), x, t, embedding)
        >>> out.shape
        (2, 8, 8, 8)

    References:
        Razzhigaev et al., "Kandinsky: an Improved Text-to-Image Synthesis with Image Prior and
        Latent Diffusion", 2023, arXiv:2310.03502
        Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents", 2022,
        arXiv:2204.06125
    """

    channels: Positive[int] = 384
    channel_multipliers: tuple[Positive[float], ...] = (1, 2, 3, 4)
    num_res_blocks: Positive[int] = 3
    residual_resampling: bool = True
    out_channels: NotNegative[int] = 8
    embedding: Embedding = WITHOUT_NULL_ROW
    token_levels: tuple[NotNegative[int], ...] | None = (1, 2, 3)
    image_width: Positive[int] = 1280
    text_width: NotNegative[int] = 0
    num_image_tokens: Positive[int] = 32
    context_width: Positive[int] = 768

    def _conditioning(
        self,
        noise_label: jax.Array,
        parts: Parts = _NO_PARTS,
    ) -> jax.Array:
        vector = super()._conditioning(noise_label, parts)
        of_image = self._dense(4 * self.channels, "added_image")(self._image_of(parts))
        if not self.text_width:
            return vector + self._norm("added_image_norm")(of_image)
        assert parts.tokens is not None
        of_text = self._dense(4 * self.channels, "added_text")(parts.tokens.pooled)
        return vector + of_image + self._norm("added_text_norm")(of_text)

    def _tokens(self, parts: Parts) -> TokenStates:
        assert parts.tokens is not None
        given, count = parts.tokens, self.num_image_tokens
        of_image = self._dense(count * self.context_width, "image_tokens")(self._image_of(parts))
        tokens = of_image.reshape(-1, count, self.context_width)
        mask = jnp.ones((tokens.shape[0], count), bool)
        if not self.text_width:
            return TokenStates(self._norm("image_tokens_norm")(tokens), mask, given.pooled)
        states = given.states[:, 1:, : self.text_width]
        of_text = self._dense(self.context_width, "text_tokens")(states)
        return TokenStates(
            jnp.concatenate([tokens, of_text], axis=1),
            jnp.concatenate([mask, given.mask[:, 1:]], axis=1),
            given.pooled,
        )

    def _image_of(self, parts: Parts) -> jax.Array:
        """The embedding of an image, `[B, image_width]`: the first token."""
        assert parts.tokens is not None
        return parts.tokens.states[:, 0, : self.image_width]

    def _dense(self, features: int, name: str) -> Callable[[jax.Array], jax.Array]:
        return Dense(features, dtype=compute_type(self.dtype), name=name)

    def _norm(self, name: str) -> Callable[[jax.Array], jax.Array]:
        return norm("layer", compute_type(self.dtype), 1e-5, True, name, use_fast_variance=False)
