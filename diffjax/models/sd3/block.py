"""Blocks of a transformer over the tokens of an image and those of a text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Bool, Float

from diffjax.errors import UserError, nearest
from diffjax.models.dit.block import TOKENS, gated, modulate, modulation_of
from diffjax.models.layers.common import Dense, SelfAttention, compute_type
from diffjax.models.layers.mlps import MLPS
from diffjax.models.layers.norms import norm
from diffjax.models.layers.placement import BATCH, constrain
from diffjax.models.layers.rotary import Rotation
from diffjax.shapes import Array, Tokens

Place = Bool[Array, " depth"] | None


class Joint(NamedTuple):
    """The tokens of an image and those of a text, `[B, T, D]` and `[B, L, D]`."""

    image: Tokens
    context: Tokens


class Given(NamedTuple):
    """What all blocks take beside the tokens.

    Attributes:
        conditioning: what modulates them, a vector for each image.
        rotation: the rotation of queries and keys, of the text's tokens and then the image's.
        mask: `[B, 1, 1, L + T]`, which tokens are attended to; None is all.
        shared: modulations that all blocks share, by the names of the layers that each would have.
    """

    conditioning: Float[Array, " batch width"]
    rotation: Rotation | None = None
    mask: Bool[Array, " batch 1 1 keys"] | None = None
    shared: Mapping[str, jax.Array] = {}


@dataclass(frozen=True)
class Layers:
    """The layers of a block; the attributes are those of `MMDiT`."""

    num_heads: int
    mlp_ratio: float
    dtype: str
    attention: str
    mlp: str
    qk_norm: bool
    bias: bool

    def attend(self, kind: type[SelfAttention], name: str, **how: Any) -> Any:
        """A layer of attention."""
        return kind(
            self.num_heads,
            self.attention,
            self.dtype,
            qkv_bias=self.bias,
            qk_norm=self.qk_norm,
            out_bias=self.bias,
            name=name,
            **how,
        )

    def mlp_of(self, width: int, name: str, down: bool = True) -> nn.Module:
        """An MLP on tokens of this width."""
        if self.mlp not in MLPS:
            raise UserError(f"mlp: no MLP {self.mlp!r}; {nearest(self.mlp, MLPS)}")
        hidden_size = int(width * self.mlp_ratio)
        return MLPS[self.mlp](hidden_size, self.dtype, self.bias, down=down, name=name)

    def normed(self, x: Tokens) -> Tokens:
        """Tokens after a layer norm that learns nothing."""
        return norm("layer", compute_type(self.dtype))(x)

    def modulations(self, given: Given, parts: int, width: int, name: str) -> list[jax.Array]:
        """Vectors `W SiLU(c)` of an image, of a layer of the block or of one that all share."""
        if name in given.shared:
            found = given.shared[name]
        else:
            found = modulation_of(self.modulation(parts, width, name), given.conditioning)
        return jnp.split(found, parts, axis=-1)

    def modulation(self, parts: int, width: int, name: str) -> nn.Dense:
        """The layer of modulations, initially 0."""
        return nn.Dense(
            parts * width,
            use_bias=self.bias,
            dtype=compute_type(self.dtype),
            kernel_init=initializers.zeros,
            name=name,
        )


class JointAttention(SelfAttention):
    """Attention of two sequences to the tokens of both; each has dense layers of its own.

    Call with the tokens of an image and of a text; returns `Joint`. The layers of the text have the
    names of the image's after `context_`. With `context_ends` the text has no output layer.
    """

    context_ends: bool = False

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, tokens: Joint, given: Given, place: Place = None
    ) -> Joint:
        image, context = self._heads(tokens.image), self._heads(tokens.context, "context_")
        q, k, v = (
            constrain(jnp.concatenate(both, axis=1), BATCH, "sequence", "tensor", None)
            for both in zip(context, image, strict=True)
        )
        looked = self._looked((q, k, v), place, given.rotation, given.mask)
        length = tokens.context.shape[1]
        of_context = tokens.context
        if not self.context_ends:
            of_context = self._joined(looked[:, :length], "context_")
        return Joint(self._joined(looked[:, length:]), of_context)


class JointBlock(nn.Module):
    """Attention over an image and a text together, and an MLP for each, with gates initially 0.

        x ← x + g₁ · attention(norm(x)·(1 + s₁) + b₁)
        x ← x + g₂ · mlp(norm(x)·(1 + s₂) + b₂)        (b₁, s₁, g₁, b₂, s₂, g₂) = W SiLU(c)

    Both sequences have layers of their own. With `dual` the image attends to itself as well, beside
    the attention over both: `x ← x + g₃ · attention₂(norm(x)·(1 + s₃) + b₃)`. After the last block
    the text is used no more: with `context_ends` it is only attended to.

    Attributes:
        layers: the layers of the block.
        dual: whether the image attends to itself as well.
        context_ends: whether the text is returned as it was.
    """

    layers: Layers
    dual: bool = False
    context_ends: bool = False

    @nn.compact
    def __call__(self, tokens: Joint, given: Given, place: Place = None) -> Joint:
        layers, width = self.layers, tokens.image.shape[-1]
        image = layers.modulations(given, 9 if self.dual else 6, width, "modulation")
        parts = 2 if self.context_ends else 6
        context = layers.modulations(given, parts, width, "context_modulation")
        normed = layers.normed(tokens.image)
        attention = layers.attend(JointAttention, "attention", context_ends=self.context_ends)
        looked = attention(
            Joint(
                modulate(normed, *image[:2]),
                modulate(layers.normed(tokens.context), *context[:2]),
            ),
            given,
            place,
        )
        x = tokens.image + gated(looked.image, image[2])
        if self.dual:
            own = layers.attend(SelfAttention, "image_attention")
            x = x + gated(own(modulate(normed, *image[6:8]), place), image[8])
        x = self._after_mlp(x, image, "mlp")
        if self.context_ends:
            return Joint(x, tokens.context)
        y = tokens.context + gated(looked.context, context[2])
        return Joint(x, self._after_mlp(y, context, "context_mlp"))

    def _after_mlp(self, x: Tokens, modulations: list[jax.Array], name: str) -> Tokens:
        shift, scale, gate = modulations[3:6]
        mlp = self.layers.mlp_of(x.shape[-1], name)
        h = modulate(self.layers.normed(x), shift, scale)
        return constrain(x + gated(mlp(h), gate), *TOKENS)


class SingleBlock(nn.Module):
    """Attention and the hidden units of an MLP beside each other, with one layer after both.

        x ← x + g · W [attention(h), hidden(h)]        h = norm(x)·(1 + s) + b

    Call with the tokens of the text and then the image, `[B, L + T, D]`. Dehghani et al. 2023
    (arXiv:2302.05442), section 2.

    Attributes:
        layers: the layers of the block.
    """

    layers: Layers

    @nn.compact
    def __call__(self, x: Tokens, given: Given, place: Place = None) -> Tokens:
        layers, width = self.layers, x.shape[-1]
        shift, scale, gate = layers.modulations(given, 3, width, "modulation")
        h = modulate(layers.normed(x), shift, scale)
        attention = layers.attend(SelfAttention, "attention", dense_out=False)
        looked = attention(h, place, given.rotation, given.mask)
        hidden = layers.mlp_of(width, "mlp", down=False)(h)
        out = Dense(
            width,
            use_bias=layers.bias,
            dtype=compute_type(layers.dtype),
            kernel_init=initializers.xavier_uniform(),
            name="out",
        )(jnp.concatenate([looked, hidden], axis=-1))
        return constrain(x + gated(out, gate), *TOKENS)
