"""Layers of all networks: embeddings of noise label and class, self-attention, compute types."""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jaxtyping import Bool, Float

from diffjax.errors import UserError, nearest
from diffjax.kinds import Positive
from diffjax.models.layers.attention import attention, masked
from diffjax.models.layers.norms import norm
from diffjax.models.layers.placement import BATCH, constrain, one_device
from diffjax.models.layers.remat import ATTENTION
from diffjax.models.layers.rotary import Rotation, rotate
from diffjax.shapes import Array, Labels, NoiseLabels, PerSample, Queries, Tokens

HIDDEN = ("intermediates", "hidden")
"""The collection and name under which a network sows activations of layers in its middle."""

STACKED = "blocks"
"""The name of the parameters of stacked blocks, whose first axis is the number of the block. Those
of a stack that begins with block 4 are `blocks_4`."""

_STACK = re.compile(rf"{STACKED}(?:_([0-9]+))?")
_BLOCK = re.compile(rf"{STACKED}(?:_[0-9]+)?|block_[0-9]+")

COMPUTE_TYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def is_stacked(path: str) -> bool:
    """Whether a parameter, by its path, is one of stacked blocks.

    Example:
        >>> is_stacked("blocks/mlp/up/kernel"), is_stacked("blocks_4/mlp/up/kernel")
        (True, True)
        >>> is_stacked("block_4/mlp/up/kernel")
        False
    """
    return any(_STACK.fullmatch(name) for name in path.split("/"))


def compute_type(name: str) -> jnp.dtype:
    """The type in which a network computes, by name; parameters and outputs stay float32.

    Raises:
        UserError: the name is not in `COMPUTE_TYPES`.

    Example:
        >>> compute_type("bfloat16")
        dtype(bfloat16)
    """
    if name not in COMPUTE_TYPES:
        raise UserError(f"dtype: no compute type {name!r}; {nearest(name, COMPUTE_TYPES)}")
    return jnp.dtype(COMPUTE_TYPES[name])


def frequency_embedding(
    noise_label: PerSample, features: int, max_period: float = 10_000.0, endpoint: bool = False
) -> Float[Array, " batch {features}"]:
    """The sinusoidal embedding of a scalar: cosines and sines at geometrically spaced frequencies.

        [cos(ω_i t), sin(ω_i t)]        ω_i = max_period^(−i / n),  i = 0 … n−1,  n = features / 2

    With `endpoint`, `ω_i = max_period^(−i / (n − 1))`: the lowest frequency is 1 / max_period.

    Args:
        noise_label: `[B]`, of the order 0 … 1000; smaller ranges hardly change the embedding.
        features: the width of the embedding, an even number; typically 128 or 256.
        max_period: the longest period is about 2π times this; typically 10,000.
        endpoint: whether the longest period is exactly 2π times this.

    Returns:
        `[B, features]` float32, for labels of any type.

    Raises:
        UserError: the width is odd.

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
    rate = -math.log(max_period) / (half - endpoint)
    frequencies = jnp.exp(rate * jnp.arange(half, dtype=jnp.float32))
    angles = noise_label.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rows_as_one(x: jax.Array, kernel: jax.Array, dimensions: Any, **how: Any) -> jax.Array:
    """The product of `x [..., n]` with a kernel, where all axes of `x` but the last become one.

    The gradient of a kernel is a sum over these axes. For more than one axis XLA:CPU stores both
    operands transposed; for one axis it does not. On a mesh the axes are not merged, because they
    are split separately.

    Args:
        x: the array that is contracted over its last axis.
        kernel: `[n, features]`.
        dimensions: dimension numbers of `jax.lax.dot_general`, without batch dimensions.
        **how: further arguments of `jax.lax.dot_general`.

    Example:
        >>> import jax.numpy as jnp
        >>> rows_as_one(jnp.ones((2, 3, 4)), jnp.ones((4, 5)), (((2,), (0,)), ((), ()))).shape
        (2, 3, 5)
    """
    if x.ndim < 3 or not one_device():
        return jax.lax.dot_general(x, kernel, dimensions, **how)
    (_, contracted), _ = dimensions
    rows = x.reshape(-1, x.shape[-1])
    out = jax.lax.dot_general(rows, kernel, (((1,), contracted), ((), ())), **how)
    return out.reshape(*x.shape[:-1], out.shape[-1])


Dense = functools.partial(nn.Dense, dot_general=rows_as_one)
"""`flax.linen.Dense` with the product `rows_as_one`; the same function and parameters."""


@dataclass(frozen=True)
class Sinusoids:
    """Cosines and sines of a noise label at geometrically spaced frequencies.

    See `frequency_embedding`.

    Attributes:
        endpoint: whether the lowest frequency is 1 / 10,000, as in DDPM, or the one above it, as in
            ADM and DiT.
        sine_first: whether the sines come first, as in DDPM.
        max_period: the longest period, over 2π; 10 for labels from 0 to 1 in DDT.
    """

    endpoint: bool = False
    sine_first: bool = False
    max_period: Positive[float] = 10_000.0

    def __call__(
        self, module: nn.Module, noise_label: PerSample, features: int, suffix: str = ""
    ) -> Float[Array, " batch {features}"]:
        """The embedding; `module` gets no parameters."""
        del module, suffix
        waves = frequency_embedding(noise_label, features, self.max_period, self.endpoint)
        return jnp.roll(waves, features // 2, axis=-1) if self.sine_first else waves


COSINES_FIRST = Sinusoids()
"""The embedding of noise labels in DiT and ADM."""


@dataclass(frozen=True)
class Fourier:
    """Sines and cosines of a noise label at random frequencies, which are not trained.

        [sin(2π f_i t), cos(2π f_i t)]        f_i ~ scale·N(0, 1)

    The frequencies are parameters without a gradient, so only weight decay would change them.

    Attributes:
        scale: the deviation of the frequencies; 16 in NCSN++, for `t = log(σ)` of the order 1.

    References:
        Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions in Low
        Dimensional Domains", 2020, arXiv:2006.10739
        Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations",
        2021, arXiv:2011.13456
    """

    scale: Positive[float] = 16.0

    def __call__(
        self, module: nn.Module, noise_label: PerSample, features: int, suffix: str = ""
    ) -> Float[Array, " batch {features}"]:
        """The embedding, with the parameter `frequencies` of `module`."""
        init = initializers.normal(self.scale)
        frequencies = module.param(f"frequencies{suffix}", init, (features // 2,), jnp.float32)
        turns = 2 * math.pi * jax.lax.stop_gradient(frequencies)
        angles = noise_label.astype(jnp.float32)[:, None] * turns[None]
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Embeddings(NamedTuple):
    """The embedded noise labels and class of each example, `[B, features]` each.

    Attributes:
        times: one for each noise label.
        label: the embedding of the class; None without classes.
    """

    times: tuple[jax.Array, ...]
    label: jax.Array | None

    @property
    def time(self) -> jax.Array:
        """The sum of the embedded noise labels."""
        return functools.reduce(jnp.add, self.times)

    @property
    def vector(self) -> jax.Array:
        """The conditioning vector: the sum of all."""
        return constrain(self.time if self.label is None else self.time + self.label, BATCH, None)


class Conditioning(nn.Module):
    """Embeds the noise label and the class of an example; their sum is its conditioning vector.

        c = W₂ SiLU(W₁ frequencies(noise_label)) + E[cond]

    `E` has `num_classes + 1` rows. The last one is the null label of classifier-free guidance,
    which is also used if `cond` is None. With `num_classes=0` there is no `E`, and `cond` is
    ignored. A label outside of the table returns NaN, not another row. With several noise labels,
    each further one adds a term like the first, with its own weights.

    Labels of augmentation are a vector of numbers `a` an example, 0 where an image is as it was;
    the frequencies become `frequencies(noise_label) + A a`, without a bias.

    Call with `noise_label [B]` or `[B, n]`, `cond [B] int32 | None` and
    `augment_labels [B, augment_dim] | None`; returns `Embeddings`, whose `vector` is `c`.

    Attributes:
        num_classes: the number of classes; 0 is unconditional.
        features: the width of the vectors.
        num_frequencies: the width of the sinusoidal embedding; 256 in DiT.
        frequencies: the embedding of the noise label, `Sinusoids` or `Fourier`.
        null_row: whether the null label has a row of `E`. Without one it adds nothing, as in EDM.
        early_labels: whether the labels are added to the frequencies, as in DDPM++, and not to the
            vector: `frequencies(noise_label) + √num_classes·E[cond] + b`.
        augment_dim: the number of labels of augmentation; 0 is without. EDM has 9 for small images.
        dtype: the compute type.
        kernel_init: the initializer of both dense layers.
        out_init: that of the second one, if it is another.
        label_init: the initializer of `E`.
        layers: whether the two dense layers are there. Without them an embedded noise label is
            `frequencies(noise_label)`, of the width `features`.
        bias: whether these two have biases.
    """

    num_classes: int
    features: int
    num_frequencies: int = 256
    frequencies: Sinusoids | Fourier = COSINES_FIRST
    null_row: bool = True
    early_labels: bool = False
    augment_dim: int = 0
    dtype: str = "float32"
    kernel_init: Initializer = initializers.normal(0.02)
    label_init: Initializer = initializers.normal(0.02)
    layers: bool = True
    bias: bool = True
    out_init: Initializer | None = None

    @nn.compact
    def __call__(
        self,
        noise_label: NoiseLabels,
        cond: Labels | None,
        augment_labels: Float[Array, " batch {self.augment_dim}"] | None = None,
    ) -> Embeddings:
        labels = noise_label.reshape(noise_label.shape[0], -1)
        of_classes = None
        if self.num_classes:
            if cond is None:
                cond = jnp.full(noise_label.shape[0], self.num_classes, jnp.int32)
            of_classes = self._of_classes(cond)
        early = of_classes if self.early_labels else None
        if self.augment_dim:
            if augment_labels is None:
                augment_labels = jnp.zeros((noise_label.shape[0], self.augment_dim))
            added = self._dense(self.num_frequencies, "augmentation", False)(augment_labels)
            early = added if early is None else early + added
        times = [self._embedded(labels[:, 0], "", early)]
        times += [self._embedded(labels[:, i], f"_{i}") for i in range(1, labels.shape[1])]
        return Embeddings(tuple(times), None if self.early_labels else of_classes)

    def _of_classes(self, cond: jax.Array) -> jax.Array:
        table = nn.Embed(
            self.num_classes + self.null_row,
            self.num_frequencies if self.early_labels else self.features,
            dtype=compute_type(self.dtype),
            embedding_init=self.label_init,
            name="label",
        )
        if self.null_row:
            found = table(cond)
        else:
            null = cond == self.num_classes
            found = jnp.where(null[:, None], 0.0, table(jnp.where(null, 0, cond)))
        if not self.early_labels:
            return found
        bias = self.param("label_bias", initializers.zeros, (self.num_frequencies,))
        return math.sqrt(self.num_classes) * found + bias.astype(found.dtype)[None]

    def _embedded(
        self, noise_label: jax.Array, suffix: str, early: jax.Array | None = None
    ) -> jax.Array:
        if not self.layers:
            h = self.frequencies(self, noise_label, self.features, suffix)
            return h.astype(compute_type(self.dtype))
        h = self.frequencies(self, noise_label, self.num_frequencies, suffix)
        h = h if early is None else h + early.astype(h.dtype)
        # Not split by width: with such a split XLA returned wrong gradients for the layers below.
        h = self._dense(self.features, f"hidden{suffix}", self.bias)(h)
        h = nn.silu(constrain(h, BATCH, None))
        return self._dense(self.features, f"out{suffix}", self.bias, self.out_init)(h)

    def _dense(
        self, features: int, name: str, use_bias: bool = True, init: Initializer | None = None
    ) -> nn.Dense:
        return nn.Dense(
            features,
            use_bias=use_bias,
            dtype=compute_type(self.dtype),
            kernel_init=init or self.kernel_init,
            name=name,
        )


QKV_ORDERS: Mapping[str, tuple[int, int, int]] = {
    "parts": (0, 1, 2),
    "heads": (1, 0, 2),
    "channels": (1, 2, 0),
}
"""Orders of the axes (part, head, channel) of the columns for queries, keys and values, the last
axis fastest: `parts` is all queries, then all keys, then all values (DiT, and ADM at 64 pixels);
`heads` is these three head by head (ADM at other sizes); `channels` is these three channel by
channel (EDM and EDM2)."""


def as_of_head_width(q: Queries, base: int) -> Queries:
    """Queries for logits `√base·(q·k)/d` in the place of `(q·k)/√d`, as muP takes them.

    In training, queries and keys align, and their product grows with d and not with √d. Yang et al.
    2022 (arXiv:2203.03466), definition 4.1.

    Args:
        q: queries `[B, T, heads, d]`.
        base: the width of a head at which both are the same; 0 changes nothing.
    """
    return q if base in (0, q.shape[-1]) else q * math.sqrt(base / q.shape[-1])


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens `[B, T, D]`, with dense layers before and after it.

    In stacked blocks, `place [depth]` is one-hot: true at the number of this block. With `rotation`
    queries and keys are rotated by the tokens' positions (`diffjax.models.layers.rotary`). With
    `mask`, `[B or 1, heads or 1, T, T]`, a token attends to those where it is true.

    One dense layer returns queries, keys and values. The order of its columns is the same function
    with other places of the weights, and published networks differ in it.

    Attributes:
        num_heads: the number of heads; divides the width D.
        attention: `"auto"` or a name in `diffjax.models.layers.attention.IMPLEMENTATIONS`.
        dtype: the compute type.
        kernel_init: the initializer of the layer for queries, keys and values.
        out_init: the initializer of the output layer.
        qkv_order: the order of the columns, a name in `QKV_ORDERS`.
        qkv_bias: whether the layer for queries, keys and values has a bias.
        qk_norm: whether the queries and keys of a head are normalised to a mean square of 1, and
            multiplied by a learned vector, the same for all heads (Dehghani et al. 2023,
            arXiv:2302.05442, with RMS norms).
        out_bias: whether the output layer has a bias.
        dense_out: whether there is an output layer.
        base_head_width: as in `as_of_head_width`; 0 changes nothing.

    Raises:
        UserError: the heads do not divide the width, or the order is unknown.
    """

    num_heads: int
    attention: str = "auto"
    dtype: str = "float32"
    kernel_init: Initializer = initializers.xavier_uniform()
    out_init: Initializer = initializers.xavier_uniform()
    qkv_order: str = "parts"
    qkv_bias: bool = True
    qk_norm: bool = False
    out_bias: bool = True
    dense_out: bool = True
    base_head_width: int = 0

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        place: Bool[Array, " depth"] | None = None,
        rotation: Rotation | None = None,
        mask: Bool[Array, "..."] | None = None,
    ) -> Tokens:
        return self._joined(self._looked(self._heads(x), place, rotation, mask))

    def _heads(self, x: Tokens, prefix: str = "") -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of tokens, `[B, T, heads, d]`."""
        dtype = compute_type(self.dtype)
        batch, length, width = x.shape
        if self.num_heads < 1 or width % self.num_heads:
            raise UserError(f"attention: {self.num_heads} heads do not divide a width of {width}")
        if self.qkv_order not in QKV_ORDERS:
            raise UserError(
                f"qkv_order: no order {self.qkv_order!r}; {nearest(self.qkv_order, QKV_ORDERS)}"
            )
        qkv = Dense(
            3 * width,
            use_bias=self.qkv_bias,
            dtype=dtype,
            kernel_init=self.kernel_init,
            name=f"{prefix}qkv",
        )(x)
        heads = (batch, length, self.num_heads, width // self.num_heads)
        order = QKV_ORDERS[self.qkv_order]
        if order != (0, 1, 2):
            sizes = 3, self.num_heads, width // self.num_heads
            columns = qkv.reshape(batch, length, *(sizes[axis] for axis in order))
            there = (0, 1, *(2 + order.index(axis) for axis in range(3)))
            qkv = columns.transpose(there).reshape(batch, length, 3 * width)
        # Each device gets whole heads, for any split of the columns of q, k and v. The gradient of
        # `split` is one concatenation; that of three slices is three padded arrays and their sum.
        q, k, v = (
            constrain(part.reshape(heads), BATCH, "sequence", "tensor", None)
            for part in jnp.split(qkv, 3, axis=-1)
        )
        if self.qk_norm:
            q = norm("rms", dtype, name=f"{prefix}q_norm")(q)
            k = norm("rms", dtype, name=f"{prefix}k_norm")(k)
        return q, k, v

    def _looked(
        self,
        heads: tuple[jax.Array, jax.Array, jax.Array],
        place: jax.Array | None,
        rotation: Rotation | None,
        mask: jax.Array | None,
    ) -> jax.Array:
        """What each token has looked at, `[B, T, heads, d]`."""
        q, k, v = heads
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q = as_of_head_width(q, self.base_head_width)
        return checkpoint_name(self.look(q, k, v, place, mask), ATTENTION)

    def _joined(self, out: jax.Array, prefix: str = "") -> Tokens:
        """The heads of each token as one vector, after the output layer."""
        batch, length, heads, width = out.shape
        out = out.reshape(batch, length, heads * width)
        if not self.dense_out:
            return out
        return Dense(
            heads * width,
            use_bias=self.out_bias,
            dtype=compute_type(self.dtype),
            kernel_init=self.out_init,
            name=f"{prefix}out",
        )(out)

    def look(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        place: jax.Array | None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """The attention itself, `[B, T, heads, d]`; `place` is used by `attention_off` alone."""
        del place
        return attention(q, k, v, self.attention) if mask is None else masked(q, k, v, mask)


@contextmanager
def attention_off(layers: str) -> Iterator[None]:
    """Perturbs networks that are evaluated in this context: each token attends to itself alone.

    Args:
        layers: a regular expression for the paths of the `SelfAttention` layers to change, such as
            `block_2/attention`; stacked blocks have the same paths. "" matches all layers.
    """

    def off(
        look: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        if not isinstance(context.module, SelfAttention) or context.method_name != "look":
            return look(*args, **kwargs)
        values, place = args[2:4]
        path = "/".join(context.module.path)
        names = [path] if place is None else [in_stack(path, i) for i in range(place.size)]
        concerned = np.array([re.search(layers, name) is not None for name in names])
        if concerned.all():
            return values
        if not concerned.any():
            return look(*args, **kwargs)
        return jnp.where((place & concerned).any(), values, look(*args, **kwargs))

    with nn.intercept_methods(off):
        yield


@contextmanager
def blocks_off(blocks: str) -> Iterator[None]:
    """Perturbs transformers that are evaluated in this context: some blocks change nothing.

    Args:
        blocks: a regular expression for the whole names of these blocks, such as `block_[789]`;
            stacked blocks have the same names.
    """

    def off(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        path = context.module.path
        if context.method_name != "__call__" or len(path) != 1 or not _BLOCK.fullmatch(path[0]):
            return call(*args, **kwargs)
        tokens, own = args[0], args[2] if len(args) > 2 else None
        place = getattr(own, "place", own)
        names = path if place is None else [in_stack(path[0], i) for i in range(place.size)]
        concerned = np.array([re.fullmatch(blocks, name) is not None for name in names])
        if concerned.all():
            return tokens
        if not concerned.any():
            return call(*args, **kwargs)
        skipped = (place & concerned).any()
        after = call(*args, **kwargs)
        return jax.tree.map(lambda old, new: jnp.where(skipped, old, new), tokens, after)

    with nn.intercept_methods(off):
        yield


def attention_layers(params: Any) -> list[str]:
    """The paths of a network's `SelfAttention` layers, from its parameters or their shapes.

    Example:
        >>> attention_layers({"block_0": {"attention": {"qkv": {}, "out": {}}, "mlp": {}}})
        ['block_0/attention']
        >>> attention_layers({"blocks": {"attention": {"qkv": {"bias": jnp.zeros((2, 24))}}}})
        ['block_0/attention', 'block_1/attention']
    """
    if not isinstance(params, Mapping):
        return []
    found = []
    for name, inner in params.items():
        if _STACK.fullmatch(name):
            depth = jax.tree.leaves(inner)[0].shape[0]
            paths = [f"{name}/{path}" for path in attention_layers(inner)]
            found += [in_stack(path, i) for i in range(depth) for path in paths]
            continue
        if isinstance(inner, Mapping) and "qkv" in inner:
            found.append(name)
        found += [f"{name}/{path}" for path in attention_layers(inner)]
    return found


def in_stack(path: str, number: int) -> str:
    """The path of a layer in one of the stacked blocks, as if the blocks were not stacked."""

    def unstacked(name: str) -> str:
        stack = _STACK.fullmatch(name)
        return name if stack is None else f"block_{int(stack[1] or 0) + number}"

    return "/".join(map(unstacked, path.split("/")))
