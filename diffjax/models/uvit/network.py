"""U-ViT: a DiT conditioned by tokens, with long skips."""

from diffjax.kinds import Positive
from diffjax.models.dit.network import DiT


class UViT(DiT):
    """A `DiT` whose noise label and class are tokens before the patches, with long skips.

    Blocks are those of a vision transformer, without modulation; each of the second half takes
    what the block opposite to it returned. Positions are learned, and the output passes a
    convolution of 3x3 pixels, but for the largest size. An untrained network returns the bias of
    that convolution, which is 0.

    `depth` counts all blocks, an odd number: one more than in the authors' code. The other settings
    are those of `DiT`; it attends to no token states.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = UViT(num_classes=10, hidden_size=32, depth=3, num_heads=2)
        >>> x, t, label = jnp.ones((2, 8, 8, 4)), jnp.ones(2), jnp.array([3, 10])
        >>> jax.jit(net.init_with_output)(jax.random.key(0), x, t, label)[0].shape
        (2, 8, 8, 4)

    References:
        Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", 2022,
        arXiv:2209.12152
    """

    hidden_size: Positive[int] = 512
    depth: Positive[int] = 13
    num_heads: Positive[int] = 8
    mlp_norm_eps: Positive[float] = 1e-5
    norm_eps: Positive[float] = 1e-5
    mlp: str = "gelu_exact"
    qkv_bias: bool = False
    positions: str = "learned"
    conditioning: str = "tokens"
    long_skips: bool = True
    final_conv: bool = True
