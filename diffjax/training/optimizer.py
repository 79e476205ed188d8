"""Optimizers, as Optax chains with their schedule beside them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffjax.kinds import Decay, Limit, NotNegative, Positive, Probability


class Optimizer(NamedTuple):
    """A gradient transformation and the learning rate it follows, by step."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule


def adamw(
    num_steps: int,
    learning_rate: NotNegative[float] = 1e-3,
    warmup_steps: NotNegative[int] = 100,
    final_fraction: Probability[float] = 1.0,
    b1: Decay[float] = 0.9,
    b2: Decay[float] = 0.999,
    eps: Positive[float] = 1e-8,
    weight_decay: NotNegative[float] = 0.0,
    clip_norm: Limit[float] = 1.0,
) -> Optimizer:
    """AdamW after clipping, with linear warm-up and cosine decay (Loshchilov & Hutter 2019).

    Args:
        num_steps: training steps, the schedule's length.
        learning_rate: its peak, at least 0.
        warmup_steps: the n-th of them has n/warmup_steps of the peak; a shorter run ends on the
            way there.
        final_fraction: of the peak, at the end, from 0 to 1; 1 keeps it constant.
        b1: decay of the first moment, from 0 to below 1.
        b2: decay of the second moment, from 0 to below 1.
        eps: added to the root of the second moment, above 0.
        weight_decay: per step, times the learning rate; at least 0.
        clip_norm: largest global norm of the gradient, above 0; `inf` clips nothing.
    """

    def warmup(step: Any) -> Any:  # The first is number 0, and no step is for nothing.
        return learning_rate * (step + 1) / max(warmup_steps, 1)

    schedule = optax.join_schedules(
        [
            warmup,
            optax.cosine_decay_schedule(
                learning_rate, max(num_steps - warmup_steps, 1), final_fraction
            ),
        ],
        [warmup_steps],
    )
    transform = optax.chain(
        clip_by_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
    )
    return Optimizer(transform, schedule)


def clip_by_norm(most: float) -> optax.GradientTransformation:
    """`g·min(1, most/|g|)`, with the norm over all parameters (Pascanu et al. 2013).

    What `optax.clip_by_global_norm` does, as one factor: XLA then multiplies by it where the
    gradient is read, and does not write the clipped gradient to memory first.

    Args:
        most: the largest norm.

    Example:
        >>> clip = clip_by_norm(1.0)
        >>> clipped, _ = clip.update(jnp.array([3.0, 4.0]), clip.init(None))
        >>> bool(jnp.allclose(clipped, jnp.array([0.6, 0.8])))
        True
    """

    def update(gradient: Any, params: Any) -> Any:
        del params
        factor = jnp.minimum(1.0, most / optax.tree.norm(gradient))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradient)

    return optax.stateless(update)
