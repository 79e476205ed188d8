"""Lion: a step of the same size for each parameter, in the direction of a sign."""

import optax

from diffjax.kinds import Decay, Limit, NotNegative
from diffjax.optimizers.base import Optimizer, clip_by_norm
from diffjax.optimizers.schedules import Constant, Schedule, warmed_up


def lion(
    num_steps: int,
    learning_rate: NotNegative[float] = 1e-4,
    warmup_steps: NotNegative[int] = 100,
    schedule: Schedule = Constant(),
    b1: Decay[float] = 0.9,
    b2: Decay[float] = 0.99,
    weight_decay: NotNegative[float] = 0.0,
    clip_norm: Limit[float] = 1.0,
) -> Optimizer:
    """Lion (Chen et al. 2023, arXiv:2302.06675): one moment in memory where AdamW has two.

        w ← w − rate·(sign(b1·m + (1 − b1)·g) + weight_decay·w)        m ← b2·m + (1 − b2)·g

    Every parameter moves by `rate` in each step, so that the rate is smaller than AdamW's.

    Args:
        num_steps: training steps, the schedule's length.
        learning_rate: its peak, at least 0; a third to a tenth of AdamW's.
        warmup_steps: the n-th of them has n/warmup_steps of the peak; 0 for none.
        schedule: of the rate after the warm-up.
        b1: share of the moment in the step's direction, from 0 to below 1.
        b2: decay of the moment, from 0 to below 1.
        weight_decay: per step, times the learning rate; at least 0, and three to ten times
            AdamW's, so that their product is the same.
        clip_norm: largest global norm of the gradient, above 0; `inf` clips nothing.
    """
    rate = warmed_up(schedule, learning_rate, warmup_steps, num_steps)
    step = optax.lion(rate, b1=b1, b2=b2, weight_decay=weight_decay)
    return Optimizer(optax.chain(clip_by_norm(clip_norm), step), rate, steps_of_rate=True)
