"""Flux.2: a Flux without biases, with gated MLPs and modulations that all blocks share."""

from diffjax.models.sd3.network import MMDiT


class Flux2(MMDiT):
    """A `Flux` (`diffjax.models.flux`) without biases, whose blocks share their modulations.

    Its latents are patches already, and a fourth axis of the rotation counts the text's tokens.
    Half of the hidden units of its gated MLPs are gates, so `mlp_ratio=4.5` is what the authors
    call 3. Its other settings are those of `MMDiT`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from diffjax.conditions import TokenStates
        >>> net = Flux2(hidden_size=32, num_heads=2, rotary_axes=(4,) * 4, depth=1, single_depth=1)
        >>> text = TokenStates(jnp.ones((2, 3, 8)), jnp.ones((2, 3), bool), jnp.ones((2, 0)))
        >>> x, t = jnp.ones((2, 4, 6, 8)), jnp.ones(2)
        >>> jax.jit(net.init_with_output)(jax.random.key(0), x, t, text)[0].shape
        (2, 4, 6, 8)
    """

    patch_size: int = 1
    hidden_size: int = 6144
    depth: int = 8
    num_heads: int = 48
    mlp_ratio: float = 4.5
    single_depth: int = 48
    qk_norm: bool = True
    rotary_axes: tuple[int, ...] = (32, 32, 32, 32)
    max_period: float = 2000.0
    shared_modulation: bool = True
    bias: bool = False
    mlp: str = "swiglu"
