"""Magnitude-preserving layers: from inputs of unit magnitude they make outputs of unit magnitude.

The magnitude of an array is its root mean square over what is normalised: all inputs of a filter,
or all channels of a pixel. So activations keep their size without group norms, at any depth. Karras
et al. 2024 (arXiv:2312.02696), whose equations are cited.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Float

from diffjax.models.layers.common import rows_as_one
from diffjax.shapes import AnyShape, Array, Images, Labels, PerSample

EPSILON = 1e-4
"""Added to a magnitude before it divides, as in the authors' code."""


def normalised(x: AnyShape, axes: tuple[int, ...]) -> AnyShape:
    """Divides by the magnitude over some axes, which is computed in float32.

        x / (√(mean of x² over the axes) + 1e-4)

    Args:
        x: any array.
        axes: those over which the mean is taken.

    Example:
        >>> import jax.numpy as jnp
        >>> [round(x.item(), 2) for x in normalised(jnp.array([3.0, 4.0, 0.0]), (0,))]
        [1.04, 1.39, 0.0]
    """
    square = jnp.mean(jnp.square(jnp.asarray(x, jnp.float32)), axes, keepdims=True)
    # The derivative of a square root is not finite at 0.
    magnitude = jnp.sqrt(square + 1e-30) + EPSILON
    return x / magnitude.astype(jnp.asarray(x).dtype)


def mp_silu(x: AnyShape) -> AnyShape:
    """`SiLU(x)/0.596`, of unit magnitude for standard normal `x` (equation 81)."""
    return nn.silu(x) / 0.596


def mp_sum(a: AnyShape, b: AnyShape, balance: float) -> AnyShape:
    """The sum of two arrays, of unit magnitude if they are uncorrelated (equation 88).

        ((1 − t)·a + t·b) / √((1 − t)² + t²)

    Args:
        a: any array.
        b: another one.
        balance: t, from 0 (all of `a`) to 1.
    """
    return (a + balance * (b - a)) / math.hypot(1.0 - balance, balance)


def mp_concatenate(
    a: Float[Array, " *rows some"], b: Float[Array, " *rows others"], balance: float
) -> Float[Array, " *rows both"]:
    """Concatenates channels so that each array has its share of the magnitude (equation 103).

        C·[(1 − t)/√n_a·a, t/√n_b·b]        C = √((n_a + n_b)/((1 − t)² + t²))

    Args:
        a: `[…, n_a]`.
        b: `[…, n_b]`.
        balance: t, from 0 (all of `a`) to 1.
    """
    few, many = a.shape[-1], b.shape[-1]
    scale = math.sqrt(few + many) / math.hypot(1.0 - balance, balance)
    parts = a * (scale * (1.0 - balance) / math.sqrt(few)), b * (scale * balance / math.sqrt(many))
    return jnp.concatenate(parts, axis=-1)


def unit_filters(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Initialises a kernel `[…, out]`: normal numbers, the inputs of each output normalised."""
    return normalised(jax.random.normal(key, shape, dtype), tuple(range(len(shape) - 1)))


def _filters(kernel: jax.Array, gain: Any, dtype: Any) -> jax.Array:
    """A kernel as it is used: each output has a vector of inputs of length 1, times the gain."""
    axes = tuple(range(kernel.ndim - 1))
    fan_in = math.prod(kernel.shape[:-1])
    return (normalised(kernel, axes) * (gain / math.sqrt(fan_in))).astype(dtype)


class MPDense(nn.Module):
    """A dense layer without bias whose weights are normalised when they are used (equation 66).

        y = gain·(Ŵᵀ x)/√n        Ŵ: each column of W divided by its magnitude

    A column may have any length, so the loss has no gradient along it, and steps lengthen it. That
    slows learning down; `diffjax.optimizers.normalised` sets the length back after each step.

    Call with `x [..., n]` and a gain, a number; returns `[..., features]` in the type of `x`.
    """

    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, " *rows inputs"], gain: Any = 1.0
    ) -> Float[Array, " *rows {self.features}"]:
        kernel = self.kernel((x.shape[-1], self.features))
        return rows_as_one(x, _filters(kernel, gain, x.dtype), (((x.ndim - 1,), (0,)), ((), ())))

    def kernel(self, shape: tuple[int, ...]) -> jax.Array:
        """The weights before they are normalised; LoRA adds its change to them."""
        return self.param("kernel", unit_filters, shape)


class MPConv(nn.Module):
    """A convolution of 3×3 pixels without bias, normalised as `MPDense` is; zeros are padded.

    Call with `x [B,H,W,C]` and a gain, a number; returns `[B,H,W,features]` in the type of `x`.
    """

    features: int

    @nn.compact
    def __call__(
        self, x: Images, gain: Any = 1.0
    ) -> Float[Array, " batch height width {self.features}"]:
        kernel = self.kernel((3, 3, x.shape[-1], self.features))
        filters = _filters(kernel, gain, x.dtype)
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, filters, (1, 1), "SAME", dimension_numbers=layout)

    def kernel(self, shape: tuple[int, ...]) -> jax.Array:
        """The weights before they are normalised; LoRA adds its change to them."""
        return self.param("kernel", unit_filters, shape)


class MPEmbedding(nn.Module):
    """A table of vectors by label: `MPDense` of one-hot vectors times the root of their length.

    The label `num_labels` has a vector of zeros, and one beyond it a vector of NaN.

    Call with `label [B] int32`; returns `[B, features]` float32.
    """

    num_labels: int
    features: int

    @nn.compact
    def __call__(self, label: Labels) -> Float[Array, " batch {self.features}"]:
        kernel = self.param("kernel", unit_filters, (self.num_labels, self.features))
        rows = jnp.pad(normalised(kernel, (0,)), ((0, 1), (0, 0)))
        return jnp.take(rows, label, axis=0, mode="fill", fill_value=jnp.nan)


class MPFourier(nn.Module):
    """Random Fourier features of a number, of unit magnitude (equation 75).

        √2·cos(f_i·x + φ_i)        f_i ~ 2π·N(0, 1),  φ_i ~ U(0, 2π)

    Frequencies and phases are constants: they are stored with the parameters, and are not trained.
    Weight decay would shrink them, so it does not go with this layer.

    Call with `x [B]`, of the order 1; returns `[B, features]` float32.
    """

    features: int

    @nn.compact
    def __call__(self, x: PerSample) -> Float[Array, " batch {self.features}"]:
        turn = 2.0 * math.pi
        shape = (self.features,)
        frequencies = self.param("frequencies", initializers.normal(turn), shape)
        phases = self.param("phases", initializers.uniform(turn), shape)
        frequencies, phases = jax.lax.stop_gradient((frequencies, phases))
        angles = jnp.asarray(x, jnp.float32)[:, None] * frequencies[None] + phases[None]
        return math.sqrt(2.0) * jnp.cos(angles)


class MPFunction(nn.Module):
    """A learned function of a number: `wᵀ fourier(x)`, with a vector w of length 1.

    Call with `x [B]`, of the order 1; returns `[B]` float32.

    Attributes:
        num_terms: the number of Fourier features.
    """

    num_terms: int

    @nn.compact
    def __call__(self, x: PerSample) -> PerSample:
        features = MPFourier(self.num_terms, name="fourier")(x)
        return MPDense(1, name="linear")(features)[:, 0]
