"""Lion: a step of the same size for each parameter, in the direction of a sign."""

from dataclasses import dataclass

import optax

from diffjax.kinds import Decay, NotNegative
from diffjax.optimizers.base import Optimizer


@dataclass(frozen=True)
class Lion:
    """Lion (Chen et al. 2023, arXiv:2302.06675): one moment in memory where AdamW has two.

        w ← w − rate·(sign(b1·m + (1 − b1)·g) + weight_decay·w)        m ← b2·m + (1 − b2)·g

    Every parameter moves by `rate` in each step, so that the rate is smaller than AdamW's: a third
    to a tenth of it.

    Args:
        b1: share of the moment in the step's direction, from 0 to below 1.
        b2: decay of the moment, from 0 to below 1.
        weight_decay: per step, times the learning rate; at least 0, and three to ten times
            AdamW's, so that their product is the same.
    """

    b1: Decay[float] = 0.9
    b2: Decay[float] = 0.99
    weight_decay: NotNegative[float] = 0.0

    def __call__(self, rate: optax.Schedule) -> Optimizer:
        step = optax.lion(rate, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay)
        return Optimizer(step, rate, steps_of_rate=True)
