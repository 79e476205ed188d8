"""SiT's network: DiT with twice the output channels, half of which are dropped."""

from typing import Any

from jaxtyping import Float

from diffjax.models.dit.network import DiT
from diffjax.shapes import Array, Images, NoiseLabels


class SiT(DiT):
    """A `DiT` that returns as many channels as its input has, the first ones of `out_channels`.

    The published network was made with the learned variance of DiT, which its objective does not
    train. Its settings are those of `DiT`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = SiT(num_classes=10, hidden_size=32, depth=1, num_heads=2, out_channels=8)
        >>> x, t, label = jnp.ones((2, 8, 8, 4)), jnp.ones(2), jnp.array([3, 10])
        >>> out, variables = jax.jit(net.init_with_output)(jax.random.key(0), x, t, label)
        >>> out.shape, variables["params"]["final_out"]["bias"].shape
        ((2, 8, 8, 4), (32,))

    References:
        Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable
        Interpolant Transformers", 2024, arXiv:2401.08740
    """

    def __call__(
        self,
        x: Images,
        noise_label: NoiseLabels,
        cond: Any = None,
        train: bool = False,
    ) -> Float[Array, " batch height width channels"]:
        return super().__call__(x, noise_label, cond, train)[..., : x.shape[-1]]
