"""AdamW and Adam: a step along the mean gradient over its root mean square."""

import optax

from diffjax.kinds import Decay, Limit, NotNegative, Positive
from diffjax.optimizers.base import Optimizer, clip_by_norm
from diffjax.optimizers.schedules import Constant, Schedule, warmed_up


def adamw(
    num_steps: int,
    learning_rate: NotNegative[float] = 1e-3,
    warmup_steps: NotNegative[int] = 100,
    schedule: Schedule = Constant(),
    b1: Decay[float] = 0.9,
    b2: Decay[float] = 0.999,
    eps: Positive[float] = 1e-8,
    weight_decay: NotNegative[float] = 0.0,
    clip_norm: Limit[float] = 1.0,
) -> Optimizer:
    """AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019).

        m ← b1·m + (1 − b1)·g           v ← b2·v + (1 − b2)·g²
        w ← w − rate·(m̂/(√v̂ + eps) + weight_decay·w)

    with m̂ = m/(1 − b1ⁿ) and v̂ = v/(1 − b2ⁿ) in the n-th step. arXiv:1711.05101.

    Args:
        num_steps: training steps, the schedule's length.
        learning_rate: its peak, at least 0; by default 1e-3. DiT is trained with 1e-4.
        warmup_steps: the n-th of them has n/warmup_steps of the peak; by default 100, 0 for none.
        schedule: of the rate after the warm-up.
        b1: decay of the first moment, from 0 to below 1; by default 0.9.
        b2: decay of the second moment, from 0 to below 1; by default 0.999. Lower values adapt
            faster when gradients change.
        eps: added to the root of the second moment, above 0; by default 1e-8.
        weight_decay: per step, times the learning rate; at least 0, and by default 0, as for DiT.
        clip_norm: largest global norm of the gradient, above 0; by default 1. `inf` clips nothing.

    Example:
        >>> float(adamw(1_000, learning_rate=2e-4, warmup_steps=4).schedule(1))
        9.999...e-05
    """
    rate = warmed_up(schedule, learning_rate, warmup_steps, num_steps)
    step = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return Optimizer(optax.chain(clip_by_norm(clip_norm), step), rate, steps_of_rate=True)


def adam(
    num_steps: int,
    learning_rate: NotNegative[float] = 1e-3,
    warmup_steps: NotNegative[int] = 100,
    schedule: Schedule = Constant(),
    b1: Decay[float] = 0.9,
    b2: Decay[float] = 0.999,
    eps: Positive[float] = 1e-8,
    clip_norm: Limit[float] = 1.0,
) -> Optimizer:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980): `adamw` without weight decay.

        w ← w − rate·m̂/(√v̂ + eps)

    Args:
        num_steps: training steps, the schedule's length.
        learning_rate: its peak, at least 0; the paper's is 1e-3.
        warmup_steps: the n-th of them has n/warmup_steps of the peak; 0, as in the paper, for none.
        schedule: of the rate after the warm-up.
        b1: decay of the first moment, from 0 to below 1.
        b2: decay of the second moment, from 0 to below 1; EDM2 takes 0.99.
        eps: added to the root of the second moment, above 0.
        clip_norm: largest global norm of the gradient, above 0; `inf` clips nothing.
    """
    return adamw(num_steps, learning_rate, warmup_steps, schedule, b1, b2, eps, 0.0, clip_norm)
