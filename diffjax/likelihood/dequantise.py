"""Dequantisation: from grey levels to densities, and from densities to bits per dimension.

A grey level `k` of `0 … levels - 1` is the number `x = 2k/(levels - 1) - 1`, in the middle of a bin
of width `w = 2/(levels - 1)`. Noise `u` in [0, 1) moves it within the bin, to `x + (u - ½)·w`. By
Jensen's inequality,

    log P(k) = log ∫ p(x + (u - ½)·w)·w^d du >= E_q[log p(x + (u - ½)·w) + d·log w - log q(u | x)]

So any noise `q` leads to a lower bound on the log-probability of the grey levels. The bound is
tight if `q` is proportional to the model's density within the bin. Theis et al. 2016
(arXiv:1511.01844); Ho et al. 2019 (arXiv:1902.00275).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from diffjax.compiling import implicit_promotion
from diffjax.shapes import AnyShape, Keys, Samples

LEVELS = 256
_BATCH_SIZE = 64
Params = dict[str, Array]


class Dequantised(NamedTuple):
    """Dequantised images and the log-density of their noise.

    Attributes:
        x: the images plus noise within their bins, of the images' shape.
        log_q: `[B]`, nats: the log-density of the noise `u` on the unit cube.
    """

    x: Array
    log_q: Array


def bin_width(levels: int = LEVELS) -> float:
    """The distance of neighbouring grey levels in [-1, 1], `2/(levels - 1)`: 2/255 for 8 bits."""
    return 2.0 / (levels - 1)


def level_centres(levels: int = LEVELS) -> Array:
    """The values of the grey levels, `[levels]`, from -1 to 1."""
    return jnp.linspace(-1.0, 1.0, levels)


def discrete_log_p(density: Array, dequantised: Dequantised, levels: int = LEVELS) -> Array:
    """A lower bound on `log P(k)`, `[B]`, in nats: `log p(x) + d·log w - log q`.

    Args:
        density: `[B]`, nats: the log-density `log p` at `dequantised.x`.
        dequantised: the images with noise.
        levels: the number of grey levels.

    Example:
        >>> flat = jnp.full(1, -3 * jnp.log(2 + 2 / 255))  # uniform over all bins of 3 pixels
        >>> spread = Dequantised(jnp.zeros((1, 3)), jnp.zeros(1))
        >>> bits_per_dim(discrete_log_p(flat, spread), 3).round(4).tolist()
        [8.0]
    """
    d = math.prod(dequantised.x.shape[1:])
    return density + d * math.log(bin_width(levels)) - dequantised.log_q


def bits_per_dim(log_p: AnyShape, d: int) -> AnyShape:
    """Bits per dimension from nats per sample, `-log_p/(d·log 2)`; lower is better.

    For a log-probability it is the size of a lossless code. For a log-density it depends on the
    units of the data and may be negative.

    Args:
        log_p: nats, of any shape.
        d: the number of dimensions, `H·W·C` for an image.

    Example:
        >>> round(float(bits_per_dim(jnp.log(1 / 256), 1)), 4)
        8.0
    """
    return -log_p / (d * math.log(2.0))


def uniform(keys: Keys, x: Samples, levels: int = LEVELS) -> Dequantised:
    """Uniform dequantisation: noise with `q(u) = 1` in each bin, so `log q = 0`.

    Args:
        keys: `[B]`, one for each image.
        x: `[B, …]`, images of grey levels.
        levels: the number of grey levels.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> x, log_q = uniform(keys, jnp.zeros((2, 4)))
        >>> bool((jnp.abs(x) <= 1 / 255).all()), log_q.tolist()
        (True, [0.0, 0.0])
    """
    u = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:]))(keys)
    return Dequantised(x + (u - 0.5) * bin_width(levels), jnp.zeros(len(x)))


def init_dequantiser(channels: int, levels: int = LEVELS) -> Params:
    """Initial parameters for `variational`, with which its noise is uniform.

    Args:
        channels: the number of image channels.
        levels: the number of grey levels.
    """
    return {
        "level": jnp.zeros((levels, 2)),
        "kernel": jnp.zeros((3, 3, channels, 2 * channels)),
    }


def variational(params: Params, keys: Keys, x: Samples) -> Dequantised:
    """Variational dequantisation: `logit u = m(x) + e^r(x)·z` with standard logistic `z`.

    `m` and `r` are each the sum of a number for the pixel's grey level and a linear 3×3 convolution
    of the image. With all parameters 0 the noise is uniform; training then improves the bound.
    Ho et al. 2019 (arXiv:1902.00275), here with a much smaller model of the noise.

    Args:
        params: from `init_dequantiser` or `fit_dequantiser`.
        keys: `[B]`, one for each image.
        x: `[B, H, W, C]`, images of grey levels.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> noisy = variational(init_dequantiser(channels=1), keys, jnp.zeros((2, 4, 4, 1)))
        >>> noisy.log_q.tolist()
        [0.0, 0.0]
    """
    levels = len(params["level"])
    k = jnp.clip(jnp.rint((x + 1.0) / bin_width(levels)).astype(jnp.int32), 0, levels - 1)
    neighbours = jax.lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    shift, log_scale = jnp.moveaxis(params["level"][k], -1, 0) + jnp.stack(
        jnp.split(neighbours, 2, axis=-1)
    )
    z = jax.vmap(lambda key: jax.random.logistic(key, x.shape[1:]))(keys)
    logit = shift + jnp.exp(log_scale) * z
    log_q = _log_logistic(z) - log_scale - _log_logistic(logit)
    u = jax.nn.sigmoid(logit)
    axes = tuple(range(1, x.ndim))
    return Dequantised(x + (u - 0.5) * bin_width(levels), jnp.sum(log_q, axis=axes))


def _log_logistic(z: Array) -> Array:
    """The log-density of the standard logistic distribution, `log(σ(z)·σ(-z))`."""
    return jax.nn.log_sigmoid(z) + jax.nn.log_sigmoid(-z)


def fit_dequantiser(
    log_density: Callable[[Array, Array, Array], Array],
    images: Array,
    key: Array,
    *,
    num_steps: int = 500,
    learning_rate: float = 0.02,
    levels: int = LEVELS,
) -> tuple[Params, Array]:
    """Fits the parameters of `variational`: maximises the bound for a model that stays fixed.

    With Adam, batches of 64 images and a cosine decay of the learning rate to 0, as one compiled
    program.

    Args:
        log_density: `(x[B,H,W,C], keys[B], rows[B]) -> [B]`, nats, differentiable in x, where
            `rows` are the images' numbers, to look up their conditions. Any lower bound on `log p`
            can be used, such as `VariationalBound(…)` with few times.
        images: `[N, H, W, C]`, training images of grey levels.
        key: for the choice of batches and for the noise.
        num_steps: the number of updates.
        learning_rate: the initial learning rate of Adam.
        levels: the number of grey levels.

    Returns:
        The parameters, and the bound on `log P(k)` at each update, `[num_steps]`, in nats, the mean
        over the batch.
    """
    import optax  # needed for fitting alone

    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    def bound(params: Params, key: Array) -> Array:
        rows_key, noise_key, density_key = jax.random.split(key, 3)
        rows = jax.random.choice(rows_key, len(images), (_BATCH_SIZE,))
        spread = variational(params, jax.random.split(noise_key, _BATCH_SIZE), images[rows])
        density = log_density(spread.x, jax.random.split(density_key, _BATCH_SIZE), rows)
        return jnp.mean(discrete_log_p(density, spread, levels))

    def step(state: tuple, key: Array) -> tuple[tuple, Array]:
        params, moments = state
        value, gradient = jax.value_and_grad(bound)(params, key)
        # Adam minimises, so it takes the gradient of the negative bound.
        with implicit_promotion():
            updates, moments = optimizer.update(jax.tree.map(jnp.negative, gradient), moments)
        return (optax.apply_updates(params, updates), moments), value

    params = init_dequantiser(images.shape[-1], levels)
    state = (params, optimizer.init(params))
    (params, _), values = jax.lax.scan(step, state, jax.random.split(key, num_steps))
    return params, values
