"""DDPM's network: a setting of `UNet`."""

from diffjax.kinds import Decay, NotNegative, Positive
from diffjax.models.layers.common import Sinusoids
from diffjax.models.unet import Embedding, Resampling, UNet

SINES_FIRST = Embedding(Sinusoids(endpoint=True, sine_first=True), null_row=False)
ONE_SIDE = Resampling(padded_before=False)


class DDPMUNet(UNet):
    """A `UNet` with DDPM's settings: norms only shift, one head, and convolutions between levels.

    Noise labels are whole timesteps, 0 to 999. The published networks have no classes; with classes
    the null label adds nothing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = DDPMUNet(num_classes=0, channels=32, channel_multipliers=(1, 2))
        >>> x, t = jnp.ones((2, 8, 8, 3)), jnp.ones(2)
        >>> out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), x, t)
        >>> out.shape
        (2, 8, 8, 3)

    References:
        Ho et al., "Denoising Diffusion Probabilistic Models", 2020, arXiv:2006.11239
    """

    channels: Positive[int] = 128
    channel_multipliers: tuple[Positive[float], ...] = (1, 2, 2, 2)
    scale_shift: bool = False
    dropout: Decay[float] = 0.1
    num_heads: NotNegative[int] = 1
    norm_epsilon: Positive[float] = 1e-6
    embedding: Embedding = SINES_FIRST
    resampling: Resampling = ONE_SIDE
