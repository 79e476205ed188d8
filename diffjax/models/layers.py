"""Pieces that the networks share: embeddings of noise and label, self-attention, compute types."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.nn.initializers import Initializer

from diffjax.errors import UserError, nearest
from diffjax.models.attention import attention

HIDDEN = ("intermediates", "hidden")
"""The collection and name under which a network sows activations of a middle layer."""

COMPUTE_TYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def compute_type(name: str) -> jnp.dtype:
    """The type that a network computes in, by name; parameters and outputs stay float32.

    Raises:
        UserError: for a name not in `COMPUTE_TYPES`.

    Example:
        >>> compute_type("bfloat16")
        dtype(bfloat16)
    """
    if name not in COMPUTE_TYPES:
        raise UserError(f"dtype: no compute type {name!r}; {nearest(name, COMPUTE_TYPES)}")
    return jnp.dtype(COMPUTE_TYPES[name])


def frequency_embedding(
    noise_label: jax.Array, features: int, max_period: float = 10_000.0
) -> jax.Array:
    """Cosines and sines of a scalar at geometrically spaced frequencies.

        [cos(ω_i t), sin(ω_i t)]        ω_i = max_period^(−i / n),  i = 0 … n−1,  n = features / 2

    Args:
        noise_label: `[B]`, of the order 0 … 1000: smaller ranges barely move the embedding.
        features: width of the embedding, even.
        max_period: the longest period is 2π times about this.

    Returns:
        `[B, features]` float32, whatever type the label has.

    Raises:
        UserError: for an odd width.

    Example:
        >>> import jax.numpy as jnp
        >>> frequency_embedding(jnp.zeros(1), 4)
        Array([[1., 1., 0., 0.]], dtype=float32)

    References:
        Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, §3.5
    """
    if features % 2:
        raise UserError(f"frequency embedding: {features} features is odd; use {features + 1}")
    half = features // 2
    frequencies = jnp.exp(-math.log(max_period) / half * jnp.arange(half, dtype=jnp.float32))
    angles = noise_label.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Conditioning(nn.Module):
    """One vector per example from its noise label and its class.

        c = W₂ SiLU(W₁ frequencies(noise_label)) + E[cond]

    `E` has `num_classes + 1` rows; the last one is the null label of classifier-free guidance, and
    stands in where `cond` is None. With `num_classes=0` there is no `E`, and `cond` is ignored. A
    label beyond the table gives NaN, not a neighbour's row.

    Call with `noise_label [B]` and `cond [B] int32 | None`; returns `[B, features]`.
    """

    num_classes: int
    features: int
    num_frequencies: int = 256
    dtype: str = "float32"
    kernel_init: Initializer = initializers.normal(0.02)
    label_init: Initializer = initializers.normal(0.02)

    @nn.compact
    def __call__(self, noise_label: jax.Array, cond: jax.Array | None) -> jax.Array:
        dtype = compute_type(self.dtype)
        h = frequency_embedding(noise_label, self.num_frequencies)
        h = nn.Dense(self.features, dtype=dtype, kernel_init=self.kernel_init, name="hidden")(h)
        h = nn.Dense(self.features, dtype=dtype, kernel_init=self.kernel_init, name="out")(
            nn.silu(h)
        )
        if self.num_classes:
            if cond is None:
                cond = jnp.full(noise_label.shape, self.num_classes, jnp.int32)
            h = h + nn.Embed(
                self.num_classes + 1,
                self.features,
                dtype=dtype,
                embedding_init=self.label_init,
                name="label",
            )(cond)
        return h


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens `[B, T, D]`: one dense to q, k, v and one back.

    Raises:
        UserError: where the heads do not divide the width.
    """

    num_heads: int
    attention: str = "auto"
    dtype: str = "float32"
    kernel_init: Initializer = initializers.xavier_uniform()
    out_init: Initializer = initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = compute_type(self.dtype)
        batch, length, width = x.shape
        if self.num_heads < 1 or width % self.num_heads:
            raise UserError(f"attention: {self.num_heads} heads do not divide a width of {width}")
        qkv = nn.Dense(3 * width, dtype=dtype, kernel_init=self.kernel_init, name="qkv")(x)
        qkv = qkv.reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = (qkv[:, :, i] for i in range(3))
        out = self.look(q, k, v).reshape(batch, length, width)
        return nn.Dense(width, dtype=dtype, kernel_init=self.out_init, name="out")(out)

    def look(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """The attention itself, `[B, T, heads, d]`."""
        return attention(q, k, v, self.attention)


@contextmanager
def attention_off(layers: str) -> Iterator[None]:
    """Where networks are called meanwhile, each token attends to itself alone.

    Args:
        layers: a regular expression of the paths of those `SelfAttention` that are concerned, as
            `block_2/attention`; "" is all.
    """

    def off(
        look: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        concerned = isinstance(context.module, SelfAttention) and context.method_name == "look"
        if concerned and re.search(layers, "/".join(context.module.path)):
            return args[2]  # the values
        return look(*args, **kwargs)

    with nn.intercept_methods(off):
        yield


def attention_layers(params: Any) -> list[str]:
    """The paths of a network's `SelfAttention`s, from its parameters or their shapes.

    Example:
        >>> attention_layers({"block_0": {"attention": {"qkv": {}, "out": {}}, "mlp": {}}})
        ['block_0/attention']
    """
    if not isinstance(params, Mapping):
        return []
    found = []
    for name, inner in params.items():
        if isinstance(inner, Mapping) and "qkv" in inner:
            found.append(name)
        found += [f"{name}/{path}" for path in attention_layers(inner)]
    return found
