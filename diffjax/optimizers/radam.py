"""RAdam: Adam that begins as momentum, until its second moment is known."""

from dataclasses import dataclass

import optax

from diffjax.kinds import Decay, Positive
from diffjax.optimizers.base import Optimizer


@dataclass(frozen=True)
class RAdam:
    """RAdam (Liu et al. 2020, arXiv:1908.03265): Adam with a warm-up of its own.

        w ← w − rate·m̂                       while ρ < 5: the first 5 steps with b2 = 0.999
        w ← w − rate·r·m̂/(√v̂ + eps)          afterwards

        ρ = ρ∞ − 2n·b2ⁿ/(1 − b2ⁿ),   ρ∞ = 2/(1 − b2) − 1
        r = √((ρ − 4)(ρ − 2)·ρ∞/((ρ∞ − 4)(ρ∞ − 2)·ρ))

    with m̂ and v̂ of Adam in the n-th step. The factor r rises to 1 over some 1/(1 − b2) steps.
    Consistency models are trained with it.

    Args:
        b1: decay of the first moment, from 0 to below 1.
        b2: decay of the second moment, from 0 to below 1.
        eps: added to the root of the second moment, above 0.
    """

    b1: Decay[float] = 0.9
    b2: Decay[float] = 0.999
    eps: Positive[float] = 1e-8

    def __call__(self, rate: optax.Schedule) -> Optimizer:
        return Optimizer(optax.radam(rate, self.b1, self.b2, self.eps), rate, steps_of_rate=True)
