"""The image encoder of CLIP: a vision transformer and a projection."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from diffjax.models.vit import ViT, quick_gelu
from diffjax.shapes import Array, Images


class ClipVision(nn.Module):
    """The embedding of images, `[B, P·G, P·G, 3] -> [B, num_features]`, of length 1.

    Attributes:
        vit: the vision transformer, whose class token is projected.
        num_features: the width of an embedding.
    """

    vit: ViT
    num_features: int

    @nn.compact
    def __call__(self, x: Images) -> Float[Array, " batch features"]:
        x = self.vit(x)[:, 0]
        x = nn.Dense(self.num_features, use_bias=False, name="projection")(x)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def clip_vision(
    width: int, depth: int, num_heads: int, num_features: int, grid: int, patch: int = 14
) -> ClipVision:
    """An image encoder of CLIP.

    Args:
        width: the width of a token.
        depth: the number of blocks.
        num_heads: the number of attention heads.
        num_features: the width of an embedding.
        grid: the number of patches per side of an image.
        patch: the side of a patch in pixels.
    """
    vit = ViT(
        width,
        depth,
        num_heads,
        grid,
        patch,
        epsilon=1e-5,
        activation=quick_gelu,
        patch_bias=False,
        norm_before=True,
    )
    return ClipVision(vit, num_features)
