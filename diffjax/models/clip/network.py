"""The image encoder of CLIP: a vision transformer and a projection."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from diffjax.errors import UserError, nearest
from diffjax.models.vit import ACTIVATIONS, ViT
from diffjax.shapes import Array, Images


class ClipVision(nn.Module):
    """The embedding of images, `[B, P·G, P·G, 3] -> [B, num_features]`.

    Attributes:
        vit: the vision transformer, whose class token is projected.
        num_features: the width of an embedding.
        unit_length: whether embeddings are divided by their length. Those of unCLIP are not.
    """

    vit: ViT
    num_features: int
    unit_length: bool = True

    @nn.compact
    def __call__(self, x: Images) -> Float[Array, " batch features"]:
        x = self.vit(x)[:, 0]
        x = nn.Dense(self.num_features, use_bias=False, name="projection")(x)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True) if self.unit_length else x


def clip_vision(
    width: int,
    depth: int,
    num_heads: int,
    num_features: int,
    grid: int,
    patch: int = 14,
    mlp_width: int | None = None,
    activation: str = "quick_gelu",
    epsilon: float = 1e-5,
) -> ClipVision:
    """An image encoder of CLIP.

    Args:
        width: the width of a token.
        depth: the number of blocks.
        num_heads: the number of attention heads.
        num_features: the width of an embedding.
        grid: the number of patches per side of an image.
        patch: the side of a patch in pixels.
        mlp_width: the width between the layers of an MLP; 4 times `width` by default.
        activation: the nonlinearity, `quick_gelu` or, in OpenCLIP, `gelu`.
        epsilon: ε of the norms.

    Raises:
        UserError: no nonlinearity has this name.
    """
    if activation not in ACTIVATIONS:
        raise UserError(
            f"activation: none is called {activation!r}; {nearest(activation, ACTIVATIONS)}"
        )
    vit = ViT(
        width,
        depth,
        num_heads,
        grid,
        patch,
        epsilon=epsilon,
        activation=ACTIVATIONS[activation],
        patch_bias=False,
        norm_before=True,
        mlp_width=mlp_width,
    )
    return ClipVision(vit, num_features)
