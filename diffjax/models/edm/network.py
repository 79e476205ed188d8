"""EDM's networks: settings of `UNet`."""

import math

from diffjax.kinds import Decay, NotNegative, Positive
from diffjax.models.layers.common import Fourier, Sinusoids
from diffjax.models.layers.resampling import SMOOTH
from diffjax.models.unet import WITHOUT_NULL_ROW, Embedding, Resampling, UNet

AUGMENT_DIM = 9
"""The labels of EDM's augmentation of small images: flips, scale, rotation, anisotropy, shift."""

POSITIONAL = Embedding(
    Sinusoids(endpoint=True, sine_first=True),
    null_row=False,
    early_labels=True,
    augment_dim=AUGMENT_DIM,
)
"""DDPM++'s: sines first, and the class added to them."""
RANDOM = Embedding(
    Fourier(16.0), width=2, null_row=False, early_labels=True, augment_dim=AUGMENT_DIM
)
"""NCSN++'s: twice as many random frequencies."""
PROJECTED = Resampling(projected=True)
NCSNPP = {
    "embedding": RANDOM,
    "resampling": Resampling(SMOOTH, projected=True),
    "images_in": "residual",
}
"""The settings that turn DDPM++ into NCSN++."""


class SongUNet(UNet):
    """A `UNet` with the settings of DDPM++; `NCSNPP` are those of NCSN++.

    Each sum is scaled by √½, norms only shift, and attention has one head. Noise labels are EDM's
    `log(σ)/4`; numbers `[B, 9]` of the condition say how images are augmented
    (`diffjax.objectives.augmentation`).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = SongUNet(num_classes=10, channels=16, channel_multipliers=(1, 2), **NCSNPP)
        >>> x, t, label = jnp.ones((2, 8, 8, 3)), jnp.ones(2), jnp.array([3, 10])
        >>> out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), x, t, label)
        >>> out.shape
        (2, 8, 8, 3)

    References:
        Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations",
        2021, arXiv:2011.13456
        Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
        arXiv:2206.00364
    """

    channels: Positive[int] = 128
    channel_multipliers: tuple[Positive[float], ...] = (2, 2, 2)
    num_res_blocks: Positive[int] = 4
    scale_shift: bool = False
    residual_resampling: bool = True
    dropout: Decay[float] = 0.13
    num_heads: NotNegative[int] = 1
    qkv_order: str = "channels"
    sparse_attention: bool = True
    norm_epsilon: Positive[float] = 1e-6
    skip_scale: Positive[float] = math.sqrt(0.5)
    embedding: Embedding = POSITIONAL
    resampling: Resampling = PROJECTED


class DhariwalUNet(UNet):
    """A `UNet` with EDM's settings of ADM: heads of 64 channels; the null label adds nothing.

    Noise labels are EDM's `log(σ)/4`.

    References:
        Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
        arXiv:2206.00364
    """

    channels: Positive[int] = 192
    channel_multipliers: tuple[Positive[float], ...] = (1, 2, 3, 4)
    num_res_blocks: Positive[int] = 3
    attention_resolutions: tuple[Positive[int], ...] = (32, 16, 8)
    residual_resampling: bool = True
    dropout: Decay[float] = 0.1
    qkv_order: str = "channels"
    embedding: Embedding = WITHOUT_NULL_ROW
