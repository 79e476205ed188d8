"""ViT: the vision transformer, whose variants DINOv2 and CLIP are (`dinov2/`, `clip/`).

CLIP's text encoders have the same blocks (`clip_text/`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from diffjax.models.layers.common import SelfAttention, compute_type
from diffjax.models.layers.norms import norm
from diffjax.shapes import Array, Images, Tokens


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, by the error function."""
    return nn.gelu(x, approximate=False)


def quick_gelu(x: jax.Array) -> jax.Array:
    """`x sigmoid(1.702 x)`, an approximation of GELU, in CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
}
"""The nonlinearities of CLIP by name, as transformers has them."""


class ViT(nn.Module):
    """The vision transformer: patches, a class token, learned positions and blocks.

    It is evaluated as `[B, P·G, P·G, 3] -> [B, 1 + registers + G², width]`: the tokens after the
    last normalisation, the class token first, then the registers and the patches, row by row.

    Attributes:
        width: the width of a token; 384 (S) to 1024 (L).
        depth: the number of blocks; 12 (S, B) or 24 (L).
        num_heads: the number of attention heads; widths of a head are 64.
        grid: the number of patches per side for which there are positions; 37 in DINOv2, 24 in CLIP
            L/14 at 336 pixels.
        patch: the side of a patch in pixels; 14 in both.
        epsilon: ε of the normalisations; 1e-6 in DINOv2, 1e-5 in CLIP.
        activation: the nonlinearity of the MLP.
        num_registers: the number of extra tokens that belong to no patch (Darcet et al. 2023,
            arXiv:2309.16588); 0 or 4.
        patch_bias: whether the embedding of patches has a bias.
        norm_before: whether the tokens are normalised before the first block.
        layer_scale: whether each branch of a block has a learned factor per channel (Touvron et al.
            2021, arXiv:2103.17239).
        resize_positions: `(positions [G, G, width], size) -> [size, size, width]` for images with
            another number of patches; None accepts images of `grid` patches alone.
        affine_end: whether the last normalisation has a scale and a bias.
        mlp_width: the width between the layers of an MLP; 4 times `width` by default.

    References:
        Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, arXiv:2010.11929
    """

    width: int
    depth: int
    num_heads: int
    grid: int
    patch: int = 14
    epsilon: float = 1e-6
    activation: Callable[[jax.Array], jax.Array] = gelu
    num_registers: int = 0
    patch_bias: bool = True
    norm_before: bool = False
    layer_scale: bool = False
    resize_positions: Callable[[jax.Array, int], jax.Array] | None = None
    affine_end: bool = True
    mlp_width: int | None = None

    @nn.compact
    def __call__(self, x: Images) -> Float[Array, " batch tokens {self.width}"]:
        zeros, window = nn.initializers.zeros, (self.patch, self.patch)
        patches = nn.Conv(
            self.width, window, window, "VALID", use_bias=self.patch_bias, name="patches"
        )(x)
        batch, size = patches.shape[:2]
        x = patches.reshape(batch, size**2, self.width)
        first = self.param("class_token", zeros, (self.width,))
        positions = self.param("positions", zeros, (1 + self.grid**2, self.width))
        if size != self.grid and self.resize_positions is not None:
            square = positions[1:].reshape(self.grid, self.grid, self.width)
            square = self.resize_positions(square, size).reshape(size**2, self.width)
            positions = jnp.concatenate([positions[:1], square])
        x = jnp.concatenate([_repeated(first[None], batch), x], 1) + positions[None]
        if self.num_registers:
            registers = self.param("registers", zeros, (self.num_registers, self.width))
            x = jnp.concatenate([x[:, :1], _repeated(registers, batch), x[:, 1:]], 1)
        if self.norm_before:
            x = _norm(self.epsilon, "norm_before")(x)
        for i in range(self.depth):
            x = Block(
                self.num_heads,
                self.epsilon,
                self.activation,
                self.layer_scale,
                self.mlp_width,
                name=f"block_{i}",
            )(x)
        return _norm(self.epsilon, "norm", affine=self.affine_end)(x)


class Block(nn.Module):
    """A transformer block: `x + γ₁ attention(norm x)`, then `x + γ₂ mlp(norm x)`.

    Without `layer_scale` both factors are 1. With `mask`, `[B or 1, 1, T, T]`, a token attends to
    those where it is true. Branches are computed in `dtype`; their sum stays in the type of x.

    Attributes:
        num_heads: the number of attention heads.
        epsilon: ε of the normalisations.
        activation: the nonlinearity of the MLP.
        layer_scale: whether each branch has a learned factor per channel.
        mlp_width: the width between the layers of the MLP; 4 times that of a token by default.
        dtype: the compute type.
    """

    num_heads: int
    epsilon: float
    activation: Callable[[jax.Array], jax.Array]
    layer_scale: bool = False
    mlp_width: int | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Tokens, mask: Bool[Array, "..."] | None = None) -> Tokens:
        width, dtype = x.shape[-1], compute_type(self.dtype)
        attention = SelfAttention(self.num_heads, "batched", self.dtype, name="attention")
        attended = attention(_norm(self.epsilon, "norm1", dtype)(x), mask=mask)
        x = x + self._scaled(attended, "scale1").astype(x.dtype)
        up = nn.Dense(self.mlp_width or 4 * width, dtype=dtype, name="up")
        hidden = self.activation(up(_norm(self.epsilon, "norm2", dtype)(x)))
        hidden = nn.Dense(width, dtype=dtype, name="down")(hidden)
        return x + self._scaled(hidden, "scale2").astype(x.dtype)

    def _scaled(self, x: Tokens, name: str) -> Tokens:
        if not self.layer_scale:
            return x
        scale: Float[Array, " width"] = self.param(name, nn.initializers.ones, x.shape[-1:])
        return scale[None, None] * x


def _norm(
    epsilon: float, name: str, dtype: Any = None, affine: bool = True
) -> Callable[[jax.Array], jax.Array]:
    return norm("layer", dtype, epsilon, affine=affine, name=name, use_fast_variance=False)


def _repeated(tokens: jax.Array, batch: int) -> jax.Array:
    """Repeats tokens for each image of a batch, `[B, n, width]`."""
    return jnp.broadcast_to(tokens, (batch, *tokens.shape))
