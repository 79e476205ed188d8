"""Blockwise attention, with memory linear in the number of tokens, on one device or on a ring.

Neither pass stores more attention weights than those of one block. The forward pass keeps a running
maximum and sum (Milakov & Gimelshein 2018, arXiv:1805.02867). Derivatives compute the weights again
from the logarithm of the sum (Dao et al. 2022, arXiv:2205.14135). The derivative is defined in
forward mode, linear in the tangents, so JAX can transpose it: both modes work.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from diffjax.models.layers.placement import BATCH, axis_size, fit
from diffjax.models.layers.remat import ATTENTION
from diffjax.shapes import Queries, Values

RING = "sequence"
"""The axis of the mesh that splits the tokens."""

_BLOCK = 512


def chunked(q: Queries, k: Values, v: Values) -> Queries:
    """Attention by blocks of 512 keys: memory linear in the tokens, both modes of derivatives.

    Example:
        >>> q = jnp.zeros((2, 600, 4, 8))
        >>> chunked(q, q, q + 1.0)[0, 0, 0, 0].item()
        1.0
    """
    return _in_blocks(q, k, v, turns=1)


def ring(q: Queries, k: Values, v: Values) -> Queries:
    """Ring attention: `chunked` with the tokens split over the mesh's `sequence` axis.

    Each device keeps its queries, while keys and values move around the ring in as many turns as
    there are devices (Liu et al. 2023, arXiv:2310.01889). Without such an axis, or if it does not
    divide the tokens, this is `chunked`.
    """
    turns = axis_size(RING)
    if turns == 1 or q.shape[1] % turns or k.shape[1] % turns:
        return chunked(q, k, v)
    spec = fit((BATCH, RING, "tensor", None), q.shape, dict(jax.sharding.get_abstract_mesh().shape))
    around = jax.shard_map(
        partial(_in_blocks, turns=turns), in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )
    return around(q, k, v)


def _in_blocks(q: Array, k: Array, v: Array, turns: int) -> Array:
    """Attention with inputs and output `[B, T, heads, d]`."""
    out, _ = _attend(*(x.swapaxes(1, 2) for x in (q, k, v)), turns)
    return out.swapaxes(1, 2)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _attend(q: Array, k: Array, v: Array, turns: int) -> tuple[Array, Array]:
    """Outputs `[B, heads, T, d]` and the log of the sums of exponentials `[B, heads, T]`."""

    def step(carry: tuple[Array, ...], k: Array, v: Array, real: Array) -> tuple[Array, ...]:
        out, top, total = carry
        logits = _logits(q, k, real)
        higher = jnp.maximum(top, logits.max(axis=-1))
        weights, kept = jnp.exp(logits - higher[..., None]), jnp.exp(top - higher)
        total = total * kept + weights.sum(axis=-1)
        return out * kept[..., None] + _mix(weights, v), higher, total

    nothing = jnp.zeros(q.shape[:-1], jnp.float32)
    start = jnp.zeros((*q.shape[:-1], v.shape[-1]), jnp.float32), nothing - jnp.inf, nothing
    out, top, total = _fold(step, start, (k, v), turns)
    return (out / total[..., None]).astype(v.dtype), top + jnp.log(total)


@_attend.defjvp
def _attend_jvp(turns: int, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    """With weights W and dS = (dQ Kᵀ + Q dKᵀ) / √d:  dO = (W∘dS) V + W dV − rowsum(W∘dS) O."""
    q, k, v = primals
    # Named, so that a policy of rematerialisation can keep them.
    out, log_total = (checkpoint_name(x, ATTENTION) for x in _attend(q, k, v, turns))

    # Without the checkpoints, the backward pass would store the weights of all blocks, and the
    # keys and values of all turns.
    @jax.checkpoint
    def derivative(q: Array, k: Array, v: Array, dq: Array, dk: Array, dv: Array) -> Any:
        @jax.checkpoint
        def step(
            carry: tuple[Array, Array], k: Array, v: Array, dk: Array, dv: Array, real: Array
        ) -> tuple[Array, Array]:
            moved, shift = carry
            weights = jnp.exp(_logits(q, k, real) - log_total[..., None])
            change = weights * (_products(dq, k) + _products(q, dk))
            return moved + _mix(change, v) + _mix(weights, dv), shift + change.sum(axis=-1)

        start = jnp.zeros(out.shape, jnp.float32), jnp.zeros(log_total.shape, jnp.float32)
        return _fold(step, start, (k, v, dk, dv), turns)

    moved, shift = derivative(q, k, v, *tangents)
    moved = moved - shift[..., None] * out.astype(jnp.float32)
    return (out, log_total), (moved.astype(out.dtype), shift)


def _products(q: Array, k: Array) -> Array:
    """`q kᵀ / √d` in float32."""
    products = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    return products / math.sqrt(q.shape[-1])


def _logits(q: Array, k: Array, real: Array) -> Array:
    return jnp.where(real[None, None, None], _products(q, k), -jnp.inf)


def _mix(weights: Array, v: Array) -> Array:
    return jnp.einsum(
        "bhqk,bhkd->bhqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )


def _fold(step: Callable[..., Any], carry: Any, arrays: tuple[Array, ...], turns: int) -> Any:
    """Folds `step` over all blocks of keys, `[B, heads, S, d]` on each device of the ring."""

    def here(carry: Any, arrays: tuple[Array, ...]) -> Any:
        blocks = [_blocks(x) for x in arrays]
        count, size = blocks[0].shape[0], blocks[0].shape[-2]
        # The padding of the last block must not count as keys.
        real = (np.arange(count * size) < arrays[0].shape[2]).reshape(count, size)
        return lax.scan(lambda carry, x: (step(carry, *x), None), carry, (*blocks, real))[0]

    def turn(state: tuple[Any, tuple[Array, ...]], _: None) -> tuple[Any, None]:
        carry, arrays = state
        to_next = [(i, (i + 1) % turns) for i in range(turns)]
        arrays = lax.ppermute(arrays, RING, to_next)
        return (here(carry, arrays), arrays), None

    carry = here(carry, arrays)
    if turns == 1:
        return carry
    return lax.scan(turn, (carry, arrays), length=turns - 1)[0][0]


def _blocks(x: Array) -> Array:
    """Splits `[B, heads, S, d]` into `[blocks, B, heads, size, d]`, padded with zeros."""
    count = -(-x.shape[2] // _BLOCK)
    size = -(-x.shape[2] // count)
    padding = [(0, 0), (0, 0), (0, count * size - x.shape[2]), (0, 0)]
    blocks = jnp.pad(x, padding).reshape(*x.shape[:2], count, size, x.shape[3])
    return jnp.moveaxis(blocks, 2, 0)
