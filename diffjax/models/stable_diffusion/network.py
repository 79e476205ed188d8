"""Stable Diffusion's network: a setting of `UNet`."""

from diffjax.kinds import NotNegative, Positive
from diffjax.models.unet import WITHOUT_NULL_ROW, Embedding, Transformers, UNet


class StableDiffusionUNet(UNet):
    """A `UNet` with the settings of Stable Diffusion 1: norms only shift, transformers on levels.

    Noise labels are whole timesteps, 0 to 999. The condition is `TokenStates`, or a dict of them
    and of numbers (SDXL), images (inpainting) or labels.

    Attributes:
        linear_projection: whether the dense layers before and after transformers are stored as
            such in published files, and not as convolutions of one pixel. The function is the same.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from diffjax.conditions import Tokens
        >>> net = StableDiffusionUNet(
        ...     0, channels=32, channel_multipliers=(1, 2), transformers=Transformers((1, 0))
        ... )
        >>> x, t, text = jnp.ones((2, 8, 8, 4)), jnp.ones(2), Tokens(5, 16).example(2)
        >>> out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), x, t, text)
        >>> out.shape
        (2, 8, 8, 4)

    References:
        Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022,
        arXiv:2112.10752
        Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image
        Synthesis", 2023, arXiv:2307.01952
    """

    channels: Positive[int] = 320
    channel_multipliers: tuple[Positive[float], ...] = (1, 2, 4, 4)
    scale_shift: bool = False
    out_channels: NotNegative[int] = 4
    num_heads: NotNegative[int] = 8
    embedding: Embedding = WITHOUT_NULL_ROW
    transformers: Transformers | None = Transformers((1, 1, 1, 0))
    linear_projection: bool = False
