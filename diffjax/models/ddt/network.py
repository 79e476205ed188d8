"""DDT: a DiT whose first blocks encode the condition of the others."""

from diffjax.kinds import NotNegative, Positive
from diffjax.models.dit.network import DiT


class DDT(DiT):
    """A `DiT` of an encoder for the condition and a decoder for the velocity.

    The encoder, the first `encoder_depth` blocks, is modulated by noise label and class. What it
    makes of each patch, and the noise label, modulates that patch in the decoder. The larger the
    network, the larger the share of its encoder: 8 of 12 blocks in B, 20 of 24 in L, 22 of 28 in
    XL. Norms are RMS norms but for the last one, MLPs are gated, positions are rotary alone, and
    counted from 0 to 16 whatever the size of the images. The defaults are those of DDT-XL/2.

    Noise labels have to be from 0 to 1 (`noise_label=time_unit`). The other settings are those of
    `DiT`. Gates are initially 0 here, and not in the authors' code.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = DDT(num_classes=10, hidden_size=32, depth=3, num_heads=2, encoder_depth=2)
        >>> x, t, label = jnp.ones((2, 8, 8, 4)), jnp.ones(2), jnp.array([3, 10])
        >>> jax.jit(net.init_with_output)(jax.random.key(0), x, t, label)[0].shape
        (2, 8, 8, 4)

    References:
        Wang, Tian, Huang & Wang, "DDT: Decoupled Diffusion Transformer", 2025, arXiv:2504.05741
    """

    hidden_size: Positive[int] = 1152
    depth: Positive[int] = 28
    num_heads: Positive[int] = 16
    norm: str = "rms"
    final_norm: str = "layer"
    mlp: str = "swiglu"
    mlp_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = True
    positions: str = "none"
    rotary: bool = True
    rotary_span: NotNegative[float] = 16.0
    max_period: Positive[float] = 10.0
    encoder_depth: NotNegative[int] = 22
