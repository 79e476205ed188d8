"""Scaled dot-product attention, one function with several implementations.

The fastest implementation depends on the platform, so it is an option of the networks
(`attention="auto"`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from diffjax.errors import UserError, nearest
from diffjax.models.layers.blockwise import RING, chunked, ring
from diffjax.models.layers.placement import BATCH, axis_size, fit
from diffjax.models.layers.remat import ATTENTION
from diffjax.shapes import Array, Queries, Values


def xla(q: Queries, k: Values, v: Values) -> Queries:
    """JAX's own attention, compiled by XLA: for all platforms, with both modes of derivatives."""
    # It promotes half precision by itself, which a user's flags may refuse.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def masked(
    q: Queries,
    k: Values,
    v: Values,
    mask: Bool[Array, "..."],
    bias: Float[Array, "..."] | None = None,
    scale: float | None = None,
) -> Queries:
    """Attention of each query to the keys that a mask shows it, by XLA.

        out = softmax(scale·q kᵀ + bias) v        over the keys where `mask` is true

    Args:
        q: queries `[B, T, heads, d]`.
        k: keys `[B, S, heads, d]`.
        v: values `[B, S, heads, d]`.
        mask: `[B or 1, heads or 1, T or 1, S]`. Of a query that sees no key the output is finite.
        bias: a bias of the same shape; none by default.
        scale: the scale of the products; by default `1/√d`.

    Example:
        >>> import jax.numpy as jnp
        >>> v = jnp.arange(3.0).reshape(1, 3, 1, 1)
        >>> masked(v, v, v, jnp.tri(3, dtype=bool)[None, None], scale=0.0).ravel().tolist()
        [0.0, 0.5, 1.0]
    """
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scale, implementation="xla")


def cudnn(q: Queries, k: Values, v: Values) -> Queries:
    """cuDNN's fused attention: NVIDIA GPUs, half precision and reverse mode (no `jax.jvp`) only."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def batched(q: Queries, k: Values, v: Values) -> Queries:
    """Attention by two batched products over `[B·heads, T, d]`: fast on CPUs."""
    batch, length, heads, width = q.shape
    # The heads move to the front once, because XLA:CPU runs only this layout as one fast product.
    # Normalising the [T, d] result instead of the [T, T] weights saves a pass over the larger
    # array, and so does scaling the queries instead of the logits.
    q = (q / math.sqrt(width)).astype(q.dtype)
    q, k, v = (x.swapaxes(1, 2).reshape(batch * heads, -1, width) for x in (q, k, v))
    logits = jnp.einsum("nqd,nkd->nqk", q, k, preferred_element_type=jnp.float32)
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("nqk,nkd->nqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = (out / total).astype(v.dtype)
    return out.reshape(batch, heads, length, width).swapaxes(1, 2)


def splash(q: Queries, k: Values, v: Values, *, interpret: bool = False) -> Queries:
    """Pallas's splash attention: TPUs, reverse mode (no `jax.jvp`) and multiples of 128 only.

    Args:
        q: queries `[B, T, heads, d]`.
        k: keys `[B, S, heads, d]`.
        v: values `[B, S, heads, d]`.
        interpret: whether to run the kernel without a TPU, very slowly.

    Raises:
        UserError: T or S is not a multiple of 128.
    """
    lengths = q.shape[1], k.shape[1]
    if lengths[0] % 128 or lengths[1] % 128:
        raise UserError(
            f"attention: splash takes tokens in multiples of 128, not {max(lengths)}; xla and "
            "chunked take any number"
        )
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    local = functools.partial(_splash, interpret=interpret)
    if math.prod(sizes.values()) > 1:
        # XLA can't partition a kernel: without shard_map it would gather the kernel's inputs.
        spec = fit((BATCH, None, "tensor", None), q.shape, sizes)
        local = jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return local(q, k, v)


def _splash(q: Queries, k: Values, v: Values, interpret: bool) -> jax.Array:
    # Here, because it loads all of Pallas, which nobody else needs.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    block_q, block_k = math.gcd(q.shape[2], 512), math.gcd(k.shape[2], 512)
    mask = kernels.MultiHeadMask([kernels.FullMask((q.shape[2], k.shape[2]))] * q.shape[1])
    attend = kernels.make_splash_mha_single_device(
        mask,
        block_sizes=kernels.BlockSizes(
            block_q=block_q,
            block_kv=block_k,
            block_kv_compute=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            block_kv_dkv_compute=block_k,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
    scaled = q / math.sqrt(q.shape[-1])
    out: Any = jax.vmap(attend)(scaled.astype(q.dtype), k, v)
    return out.swapaxes(1, 2)


IMPLEMENTATIONS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "xla": xla,
    "batched": batched,
    "cudnn": cudnn,
    "chunked": chunked,
    "splash": splash,
    "ring": ring,
}


REVERSE_ONLY = ("cudnn", "splash")
"""The implementations without a derivative in forward mode (`jax.jvp`)."""


def resolve(
    implementation: str,
    platform: str,
    dtype: str = "float32",
    sequence: int = 1,
    forward_mode: bool = False,
) -> str:
    """The name of the implementation that is used on a platform.

    `"auto"` becomes `"ring"` where the tokens are split, `"batched"` on a CPU, `"cudnn"` on a GPU
    in half precision (`"chunked"` where forward mode is needed) and `"xla"` everywhere else. Any
    other name is returned.

    Args:
        implementation: `"auto"` or a name in `IMPLEMENTATIONS`.
        platform: the name in `jax.default_backend()`: `"cpu"`, `"gpu"`, `"tpu"`.
        dtype: the name of the compute type.
        sequence: the number of parts into which the mesh splits the tokens.
        forward_mode: whether the network is differentiated by `jax.jvp`.

    Raises:
        UserError: the name is unknown (the nearest known one is in the message), or forward mode is
            needed and not available.

    Example:
        >>> resolve("auto", "cpu"), resolve("auto", "gpu", "bfloat16"), resolve("xla", "cpu")
        ('batched', 'cudnn', 'xla')
    """
    if forward_mode and implementation in REVERSE_ONLY:
        raise UserError(
            f"attention={implementation} has no derivative in forward mode (jax.jvp), which this "
            "objective needs: use auto, xla or chunked"
        )
    if isinstance(implementation, str) and implementation in IMPLEMENTATIONS:
        return implementation
    if implementation != "auto":
        known = nearest(implementation, ["auto", *IMPLEMENTATIONS])
        raise UserError(f"attention: no implementation {implementation!r}; {known}")
    if sequence > 1:
        return "ring"
    if platform == "gpu" and jnp.dtype(dtype).itemsize == 2:
        return "chunked" if forward_mode else "cudnn"
    return "batched" if platform == "cpu" else "xla"


def attention(q: Queries, k: Values, v: Values, implementation: str = "auto") -> Queries:
    """Scaled dot-product attention of every query over all keys, for each head.

        out = softmax(q kᵀ / √d) v        with the softmax in float32

    Args:
        q: queries `[B, T, heads, d]`.
        k: keys `[B, S, heads, d]`.
        v: values `[B, S, heads, d]`.
        implementation: `"auto"` (for the default platform) or a name in `IMPLEMENTATIONS`.

    Returns:
        `[B, T, heads, d]` in the type of `v`.

    Raises:
        UserError: the implementation is unknown; the nearest known one is in the message.

    Example:
        >>> import jax.numpy as jnp
        >>> q = jnp.zeros((2, 16, 4, 8))
        >>> attention(q, q, q, "batched").shape
        (2, 16, 4, 8)

    References:
        Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762
    """
    name = resolve(implementation, jax.default_backend(), q.dtype.name, axis_size(RING))
    return IMPLEMENTATIONS[name](q, k, v)
