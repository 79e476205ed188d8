"""Draws the latents of a training batch from their posteriors, on the devices."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Sharding

from diffjax.codecs import Posterior
from diffjax.data.latents import LOG_VARIANCE

# Folded into the run's key, so that no other random number shares it.
_POSTERIOR = 0x6C61


def posterior_key(seed: int) -> Array:
    """The key of all draws of a run.

    Example:
        >>> bool((posterior_key(0) == jax.random.fold_in(jax.random.key(0), 0x6C61)).all())
        True
    """
    return jax.random.fold_in(jax.random.key(seed), _POSTERIOR)


def drawn(batch: Mapping[str, Array], keys: Array, step: int) -> dict[str, Array]:
    """The batch with a sample of each latent's posterior in the place of its mean.

        image = mean + exp(log_variance / 2)·eps,    eps ~ N(0, 1) by a key of the run, step and row

    So the draw depends on nothing else: neither on the mesh nor on where the run resumed. A batch
    without log-variances is returned as it is.

    Args:
        batch: `image [B, h, w, c]` and perhaps `log_variance` of the same shape; or of an ensemble
            `[S, B, h, w, c]`.
        keys: the run's key (`posterior_key`), or `[S]` of them.
        step: the step of the training, from 0.

    Example:
        >>> means = jnp.ones((2, 4, 4, 3))
        >>> batch = {"image": means, LOG_VARIANCE: jnp.full(means.shape, -30.0)}
        >>> found = drawn(batch, posterior_key(0), 7)
        >>> list(found), bool(jnp.allclose(found["image"], means, atol=1e-5))
        (['image'], True)
    """
    rest = dict(batch)
    if (log_variance := rest.pop(LOG_VARIANCE, None)) is None:
        return rest
    program = _program(rest["image"].sharding, stacked=keys.ndim > 0)
    return {**rest, "image": program(rest["image"], log_variance, keys, jnp.int32(step))}


@cache
def _program(place: Sharding, stacked: bool) -> Any:
    def sample(means: Array, log_variance: Array, key: Array, step: Array) -> Array:
        of_step = jax.random.fold_in(key, step)
        keys = jax.vmap(lambda i: jax.random.fold_in(of_step, i))(jnp.arange(len(means)))
        return Posterior(means, log_variance).samples(keys)

    mapped = jax.vmap(sample, (0, 0, 0, None)) if stacked else sample
    return jax.jit(mapped, out_shardings=place)
