"""Scaled dot-product attention behind one function, with a choice of implementation.

Which one is fastest depends on the platform, so the choice is an option of the networks
(`attention="auto"`) and never part of their text.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.errors import UserError, nearest


def xla(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """JAX's own attention, compiled by XLA: runs everywhere, differentiates in both modes."""
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """cuDNN's fused attention: NVIDIA GPUs, half precision and reverse mode (no `jax.jvp`) only."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def batched(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Two batched products over `[B·heads, T, d]`, normalised after the second: fast on CPUs."""
    batch, length, heads, width = q.shape
    # The heads move to the front once, because XLA:CPU runs only this layout as one fast product;
    # dividing the [T, d] result instead of the [T, T] weights saves a pass over the larger array.
    q, k, v = (x.swapaxes(1, 2).reshape(batch * heads, -1, width) for x in (q, k, v))
    logits = jnp.einsum("nqd,nkd->nqk", q, k, preferred_element_type=jnp.float32)
    logits = logits / math.sqrt(width)
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("nqk,nkd->nqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = (out / total).astype(v.dtype)
    return out.reshape(batch, heads, length, width).swapaxes(1, 2)


IMPLEMENTATIONS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "xla": xla,
    "batched": batched,
    "cudnn": cudnn,
}


def resolve(implementation: str, platform: str, dtype: str = "float32") -> str:
    """The name in `IMPLEMENTATIONS` that `implementation` stands for on a platform.

    `"auto"` becomes `"batched"` on a CPU, `"cudnn"` on a GPU in half precision and `"xla"`
    everywhere else; any other name stands for itself.

    Args:
        implementation: `"auto"` or a name in `IMPLEMENTATIONS`.
        platform: as `jax.default_backend()` names it: `"cpu"`, `"gpu"`, `"tpu"`.
        dtype: the compute type by name.

    Raises:
        UserError: for an unknown name, with the nearest known one.

    Example:
        >>> resolve("auto", "cpu"), resolve("auto", "gpu", "bfloat16"), resolve("xla", "cpu")
        ('batched', 'cudnn', 'xla')
    """
    if implementation in IMPLEMENTATIONS:
        return implementation
    if implementation != "auto":
        known = nearest(implementation, ["auto", *IMPLEMENTATIONS])
        raise UserError(f"attention: no implementation {implementation!r}; {known}")
    if platform == "gpu" and jnp.dtype(dtype).itemsize == 2:
        return "cudnn"
    return "batched" if platform == "cpu" else "xla"


def attention(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str = "auto") -> jax.Array:
    """Attention of every query over all keys, per head.

        out = softmax(q kᵀ / √d) v        with the softmax in float32

    Args:
        q: queries `[B, T, heads, d]`.
        k: keys `[B, S, heads, d]`.
        v: values `[B, S, heads, d]`.
        implementation: `"auto"` (for the platform that runs the trace) or a name in
            `IMPLEMENTATIONS`.

    Returns:
        `[B, T, heads, d]` in the type of `v`.

    Raises:
        UserError: for an unknown implementation, with the nearest known one.

    Example:
        >>> import jax.numpy as jnp
        >>> q = jnp.zeros((2, 16, 4, 8))
        >>> attention(q, q, q, "batched").shape
        (2, 16, 4, 8)

    References:
        Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762
    """
    name = resolve(implementation, jax.default_backend(), q.dtype.name)
    return IMPLEMENTATIONS[name](q, k, v)
