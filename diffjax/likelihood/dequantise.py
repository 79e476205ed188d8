"""From grey levels to densities: dequantisation, and what a density then says about the levels.

A `k` of `0 … levels - 1` sits at `x = 2k/(levels - 1) - 1`, in a bin of width `w = 2/(levels - 1)`
around it. Noise `u` in [0, 1) spreads it over the bin, `x + (u - ½)·w`, and by Jensen

    log P(k) = log ∫ p(x + (u - ½)·w)·w^d du >= E_q[log p(x + (u - ½)·w) + d·log w - log q(u | x)]

so any `q` gives a lower bound on the log-probability of the levels, the tighter the nearer `q` is
to the model's own density within the bin. Theis et al. 2016 (arXiv:1511.01844); Ho et al. 2019
(arXiv:1902.00275).
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
Params = dict[str, Array]


class Dequantised(NamedTuple):
    """Images spread over their bins.

    Attributes:
        x: like the images.
        log_q: `[B]`, nats: log-density of the noise on the unit cube.
    """

    x: Array
    log_q: Array


def bin_width(levels: int = LEVELS) -> float:
    """The distance of neighbouring grey levels in [-1, 1]: 2/255 for 8 bits."""
    return 2.0 / (levels - 1)


def level_centres(levels: int = LEVELS) -> Array:
    """Where the grey levels lie, `[levels]`."""
    return jnp.linspace(-1.0, 1.0, levels)


def discrete_log_p(density: Array, dequantised: Dequantised, levels: int = LEVELS) -> Array:
    """A lower bound on `log P(k)`, `[B]`, in nats: `log p(x) + d·log w - log q`.

    Args:
        density: `[B]`, `log p` of `dequantised.x`.
        dequantised: where the density was taken.
        levels: grey levels.

    Example:
        >>> flat = jnp.full(1, -3 * jnp.log(2 + 2 / 255))  # uniform over all bins of 3 pixels
        >>> spread = Dequantised(jnp.zeros((1, 3)), jnp.zeros(1))
        >>> bits_per_dim(discrete_log_p(flat, spread), 3).round(4).tolist()
        [8.0]
    """
    d = math.prod(dequantised.x.shape[1:])
    return density + d * math.log(bin_width(levels)) - dequantised.log_q


def bits_per_dim(log_p: AnyShape, d: int) -> AnyShape:
    """`-log_p/(d·log 2)`: nats of a whole sample to bits per dimension; lower is better.

    Of a log-probability it is the size of a lossless code. Of a log-density it depends on the
    data's units and may be negative.

    Args:
        log_p: nats, any shape.
        d: dimensions, `H·W·C` of an image.

    Example:
        >>> round(float(bits_per_dim(jnp.log(1 / 256), 1)), 4)
        8.0
    """
    return -log_p / (d * math.log(2.0))


def uniform(keys: Keys, x: Samples, levels: int = LEVELS) -> Dequantised:
    """Every point of the bin alike: `log q = 0`.

    Args:
        keys: `[B]`, one for each image.
        x: `[B, …]`, on the grey levels.
        levels: grey levels.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> x, log_q = uniform(keys, jnp.zeros((2, 4)))
        >>> bool((jnp.abs(x) <= 1 / 255).all()), log_q.tolist()
        (True, [0.0, 0.0])
    """
    u = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:]))(keys)
    return Dequantised(x + (u - 0.5) * bin_width(levels), jnp.zeros(len(x)))


def init_dequantiser(channels: int, levels: int = LEVELS) -> Params:
    """Parameters of `variational` that make it `uniform`.

    Args:
        channels: of the images.
        levels: grey levels.
    """
    return {
        "level": jnp.zeros((levels, 2)),
        "kernel": jnp.zeros((3, 3, channels, 2 * channels)),
    }


def variational(params: Params, keys: Keys, x: Samples) -> Dequantised:
    """Noise that depends on the image: `logit u = m(x) + e^r(x)·z`, `z` standard logistic.

    `m` and `r` are a pair of numbers for the pixel's grey level plus a linear 3×3 convolution of
    the image. At 0 the noise is uniform, so what is learned can only be gained.

    Args:
        params: of `init_dequantiser` or `fit_dequantiser`.
        keys: `[B]`, one for each image.
        x: `[B, H, W, C]`, on the grey levels.

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
    """Log-density of the standard logistic distribution, `log σ(z)·σ(-z)`."""
    return jax.nn.log_sigmoid(z) + jax.nn.log_sigmoid(-z)


def fit_dequantiser(
    log_density: Callable[[Array, Array, Array | None], Array],
    images: Array,
    labels: Array | None,
    key: Array,
    *,
    num_steps: int = 500,
    batch_size: int = 64,
    learning_rate: float = 0.02,
    levels: int = LEVELS,
) -> tuple[Params, Array]:
    """Maximises the bound over the dequantiser; the model stays as it is.

    Adam with its rate falling to 0 along half a cosine, as one program.

    Args:
        log_density: `(x[B,H,W,C], keys[B], labels[B] or None) -> [B]`, nats, differentiable in x;
            any lower bound on `log p` will do, as `variational_bound(…).log_p` with few times.
        images: `[N, H, W, C]` on the grey levels, those of the training.
        labels: `[N]`, or None.
        key: of batches and noise.
        num_steps: updates.
        batch_size: images at a time.
        learning_rate: at the start.
        levels: grey levels.

    Returns:
        The parameters, and the bound on `log P(k)`, `[num_steps]`, nats, mean of each batch.
    """
    import optax  # fitting needs it, nothing else in this room does

    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    def bound(params: Params, key: Array) -> Array:
        rows_key, noise_key, density_key = jax.random.split(key, 3)
        rows = jax.random.choice(rows_key, len(images), (batch_size,))
        spread = variational(params, jax.random.split(noise_key, batch_size), images[rows])
        density = log_density(
            spread.x,
            jax.random.split(density_key, batch_size),
            None if labels is None else labels[rows],
        )
        return jnp.mean(discrete_log_p(density, spread, levels))

    def step(state: tuple, key: Array) -> tuple[tuple, Array]:
        params, moments = state
        value, gradient = jax.value_and_grad(bound)(params, key)
        # Adam descends: it is handed the slope of the negative bound.
        with implicit_promotion():
            updates, moments = optimizer.update(jax.tree.map(jnp.negative, gradient), moments)
        return (optax.apply_updates(params, updates), moments), value

    params = init_dequantiser(images.shape[-1], levels)
    state = (params, optimizer.init(params))
    (params, _), values = jax.lax.scan(step, state, jax.random.split(key, num_steps))
    return params, values
