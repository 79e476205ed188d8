"""LightningDiT: a DiT with RMS norms, SwiGLU and rotary positions."""

from diffjax.models.dit.network import DiT


class LightningDiT(DiT):
    """A `DiT` with RMS norms, gated MLPs, and rotary beside fixed positions.

    Its other settings are those of `DiT`. With `qk_norm`, queries and keys are normalised too,
    which the authors recommend where the loss becomes NaN.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = LightningDiT(num_classes=10, hidden_size=32, depth=1, num_heads=2)
        >>> x, t, label = jnp.ones((2, 8, 8, 4)), jnp.ones(2), jnp.array([3, 10])
        >>> jax.jit(net.init_with_output)(jax.random.key(0), x, t, label)[0].shape
        (2, 8, 8, 4)

    References:
        Yao, Yang & Wang, "Reconstruction vs. Generation: Taming Optimization Dilemma in Latent
        Diffusion Models", 2025, arXiv:2501.01423
    """

    norm: str = "rms"
    mlp: str = "swiglu"
    rotary: bool = True
