"""What a network makes of its condition: labels, token states, images in further channels."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Float

from diffjax.conditions import Augmented, TokenStates
from diffjax.errors import UserError
from diffjax.models.layers.attention import masked
from diffjax.models.layers.common import Dense, SelfAttention, as_of_head_width, compute_type
from diffjax.models.layers.placement import BATCH, constrain
from diffjax.shapes import Array, Images, Tokens


class Parts(NamedTuple):
    """The parts of a condition, grouped by their use in a network.

    Attributes:
        labels: int `[B]`, added to the conditioning vector through a table; None without classes.
        tokens: attended to; None without.
        images: `[B, H, W, C]` each, concatenated with the input in the channels; the level of noise
            in one (`LowResolution`) is a further channel.
        numbers: `[B, k]`, embedded beside the noise label.
    """

    labels: jax.Array | None = None
    tokens: TokenStates | None = None
    images: tuple[jax.Array, ...] = ()
    numbers: jax.Array | None = None


def parts_of(cond: Any, takes_numbers: bool = False) -> Parts:
    """The parts of a condition: labels, token states, images, numbers, or a dict of these.

    Args:
        cond: the condition.
        takes_numbers: whether the network embeds numbers.

    Raises:
        UserError: two parts of labels, of tokens or of numbers, arrays of another shape, or numbers
            for a network that embeds none.

    Example:
        >>> import jax.numpy as jnp
        >>> parts = parts_of({"digit": jnp.array([3]), "coarse": jnp.zeros((1, 8, 8, 1))})
        >>> parts.labels.tolist(), len(parts.images), parts.tokens
        ([3], 1, None)
    """
    found = Parts()
    for part in cond.values() if isinstance(cond, Mapping) else [cond]:
        if part is None:
            continue
        if isinstance(part, Augmented):
            images, level = part
            where = jnp.broadcast_to(level[:, None, None, None], (*images.shape[:3], 1))
            found = found._replace(images=(*found.images, images, where))
        elif isinstance(part, TokenStates) and found.tokens is None:
            found = found._replace(tokens=part)
        elif not isinstance(part, tuple) and part.ndim == 1 and found.labels is None:
            found = found._replace(labels=part)
        elif not isinstance(part, tuple) and part.ndim == 2 and found.numbers is None:
            found = found._replace(numbers=part)
        elif not isinstance(part, tuple) and part.ndim == 4:
            found = found._replace(images=(*found.images, part))
        else:
            raise UserError(
                "a network takes one part of labels [B], one of token states, one of numbers "
                "[B, k] and images [B, H, W, C]; this condition has "
                f"{jax.tree.map(jnp.shape, cond)}"
            )
    if found.numbers is not None and not takes_numbers:
        raise UserError(
            "this network embeds no numbers: take a UNet with embedding.added_width, or for labels "
            "of augmentation with embedding.augment_dim"
        )
    return found


class Enlarged(nn.Module):
    """Images `[B, h, w, C]` at whole multiples of their sides, by linear interpolation.

    Attributes:
        factors: the factors of height and width.
    """

    factors: tuple[int, int]

    @nn.compact
    def __call__(self, image: Images) -> Float[Array, " batch rows columns channels"]:
        batch, height, width, channels = image.shape
        rows, columns = self.factors
        shape = (batch, height * rows, width * columns, channels)
        return jax.image.resize(image, shape, "linear")


def beside(x: Images, images: tuple[jax.Array, ...]) -> Float[Array, " batch height width both"]:
    """The images with others beside them, in further channels; smaller ones are enlarged.

    For modules: it is called within a compact method.

    Raises:
        UserError: a height or width that does not divide.
    """
    found = [x]
    for image in images:
        (height, width), (rows, columns) = x.shape[1:3], image.shape[1:3]
        if height % rows or width % columns:
            raise UserError(
                f"the condition's images of {rows}x{columns} pixels are to lie beside images of "
                f"{height}x{width}: resize them to that, or to a whole fraction"
            )
        same = (rows, columns) == (height, width)
        found.append(image if same else Enlarged((height // rows, width // columns))(image))
    return jnp.concatenate(found, axis=-1) if images else x


class CrossAttention(nn.Module):
    """Attention of the tokens of an image `[B, T, D]` to those of the condition.

    Beside the condition's tokens there is a learned null token, so an example without any token
    attends to that alone. The output layer is initially 0: a network begins as without the layer.
    Chen et al. 2023 (arXiv:2310.00426).

    Attributes:
        num_heads: the number of heads; divides the width D.
        dtype: the compute type.
        null_token: whether there is a null token. Without it, as in Stable Diffusion, an example
            without any token attends to its masked states, all alike.
        qkv_bias: whether the layers of queries, keys and values have biases.
        base_head_width: as in `diffjax.models.layers.common.SelfAttention`.
    """

    num_heads: int
    dtype: str = "float32"
    null_token: bool = True
    qkv_bias: bool = True
    base_head_width: int = 0

    @nn.compact
    def __call__(self, x: Tokens, context: TokenStates) -> Tokens:
        dtype = compute_type(self.dtype)
        batch, length, width = x.shape
        states, mask = context.states.astype(dtype), context.mask
        if self.null_token:
            init = initializers.normal(0.02)
            null = self.param("null", init, (1, states.shape[-1]), jnp.float32)
            null = jnp.broadcast_to(null.astype(dtype), (batch, 1, states.shape[-1]))
            states = jnp.concatenate([null, states], axis=1)
            mask = jnp.concatenate([jnp.ones((batch, 1), bool), mask], axis=1)
        how: Any = {
            "use_bias": self.qkv_bias,
            "dtype": dtype,
            "kernel_init": initializers.xavier_uniform(),
        }
        q = Dense(width, name="q", **how)(x)
        kv = Dense(2 * width, name="kv", **how)(states)
        q, k, v = (
            constrain(
                part.reshape(batch, -1, self.num_heads, width // self.num_heads),
                BATCH, None, "tensor", None,
            )
            for part in (q, *jnp.split(kv, 2, axis=-1))
        )  # fmt: skip
        q = as_of_head_width(q, self.base_head_width)
        out = masked(q, k, v, mask[:, None, None, :])
        return Dense(width, dtype=dtype, kernel_init=initializers.zeros, name="out")(
            out.reshape(batch, length, width)
        )


class AttentionWithTokens(SelfAttention):
    """Self-attention whose keys and values are also those of the condition's tokens.

        softmax(q [k_c, k]ᵀ / √d) [v_c, v]        k_c, v_c = W tokens

    In one softmax an image's tokens attend to those of the condition and to each other. Nichol et
    al. 2021 (GLIDE, arXiv:2112.10741), section 2.3. Attributes are those of `SelfAttention`.
    """

    @nn.compact
    def __call__(self, x: Tokens, context: TokenStates) -> Tokens:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, *own = self._heads(x)
        batch, length, heads, width = q.shape
        kv = Dense(
            2 * heads * width,
            dtype=compute_type(self.dtype),
            kernel_init=self.kernel_init,
            name="context_kv",
        )(context.states.astype(x.dtype))
        given = (part.reshape(batch, -1, heads, width) for part in jnp.split(kv, 2, axis=-1))
        k, v = (jnp.concatenate(both, axis=1) for both in zip(given, own, strict=True))
        shown = jnp.concatenate([context.mask, jnp.ones((batch, length), bool)], axis=1)
        return self._joined(masked(q, k, v, shown[:, None, None]))
