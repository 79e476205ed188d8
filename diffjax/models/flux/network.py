"""Flux: an MMDiT that goes on over text and image as one sequence, with rotated positions."""

from diffjax.models.sd3.network import MMDiT


class Flux(MMDiT):
    """An `MMDiT` with rotary positions, and blocks over one sequence after those over two.

    Its other settings are those of `MMDiT`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from diffjax.conditions import TokenStates
        >>> net = Flux(hidden_size=32, num_heads=2, rotary_axes=(4, 6, 6), depth=1, single_depth=1)
        >>> text = TokenStates(jnp.ones((2, 3, 8)), jnp.ones((2, 3), bool), jnp.ones((2, 5)))
        >>> x, t = jnp.ones((2, 8, 12, 4)), jnp.ones(2)
        >>> jax.jit(net.init_with_output)(jax.random.key(0), x, t, text)[0].shape
        (2, 8, 12, 4)

    References:
        Black Forest Labs et al., "FLUX.1 Kontext: Flow Matching for In-Context Image Generation and
        Editing in Latent Space", 2025, arXiv:2506.15742, section 2
    """

    hidden_size: int = 3072
    depth: int = 19
    num_heads: int = 24
    qk_norm: bool = True
    single_depth: int = 38
    rotary_axes: tuple[int, ...] = (16, 56, 56)
