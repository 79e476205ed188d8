"""JiT ("just image transformers"): a DiT on large patches of pixels."""

from diffjax.kinds import NotNegative, Positive
from diffjax.models.dit.network import DiT


class JiT(DiT):
    """A `DiT` for images without a codec, in patches of 16 or 32 pixels.

    A patch has more numbers than a token, noise among them, so the network is to predict the clean
    image (`objective=jit`), which lies near a manifold of few dimensions; and patches are embedded
    through a bottleneck. It has RMS norms, gated MLPs, rotary positions, normalised queries and
    keys, and in-context class tokens from a middle block on. The defaults are those of JiT-B/16.

    Its other settings are those of `DiT`. The authors' code, unlike `dropout` here, drops within
    the MLPs of H and G, and in the middle half of the blocks alone.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = JiT(num_classes=10, hidden_size=32, depth=2, num_heads=2, class_tokens_from=1)
        >>> x, t, label = jnp.ones((2, 32, 32, 3)), jnp.ones(2), jnp.array([3, 10])
        >>> jax.jit(net.init_with_output)(jax.random.key(0), x, t, label)[0].shape
        (2, 32, 32, 3)

    References:
        Li & He, "Back to Basics: Let Denoising Generative Models Denoise", 2025, arXiv:2511.13720
    """

    patch_size: Positive[int] = 16
    hidden_size: Positive[int] = 768
    num_heads: Positive[int] = 12
    norm: str = "rms"
    mlp: str = "swiglu"
    qk_norm: bool = True
    rotary: bool = True
    bottleneck: NotNegative[int] = 128
    num_class_tokens: NotNegative[int] = 32
    class_tokens_from: NotNegative[int] = 4
