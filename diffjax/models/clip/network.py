"""The image encoder of CLIP: a vision transformer and a projection."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from diffjax.errors import UserError, nearest
from diffjax.models.vit import ACTIVATIONS, ViT
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
    width: int,
    depth: int,
    num_heads: int,
    num_features: int,
    grid: int,
    patch: int = 14,
    **how: Any,
) -> ClipVision:
    """An image encoder of CLIP.

    Args:
        width: the width of a token.
        depth: the number of blocks.
        num_heads: the number of attention heads.
        num_features: the width of an embedding.
        grid: the number of patches per side of an image.
        patch: the side of a patch in pixels.
        **how: `activation`, `quick_gelu` in CLIP and `gelu` in OpenCLIP; `epsilon` of the norms,
            1e-5 by default; and `mlp_width`, 4 times `width` by default.

    Raises:
        UserError: no such activation.
    """
    name = how.pop("activation", "quick_gelu")
    if name not in ACTIVATIONS:
        raise UserError(f"activation: none is called {name!r}; {nearest(name, ACTIVATIONS)}")
    vit = ViT(
        width,
        depth,
        num_heads,
        grid,
        patch,
        **{"epsilon": 1e-5, **how},
        activation=ACTIVATIONS[name],
        patch_bias=False,
        norm_before=True,
    )
    return ClipVision(vit, num_features)
