"""AdamW and Adam: a step along the mean gradient over its root mean square."""

from dataclasses import dataclass

import optax

from diffjax.kinds import Decay, NotNegative, Positive
from diffjax.optimizers.base import Optimizer


@dataclass(frozen=True)
class AdamW:
    """AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019).

        m ← b1·m + (1 − b1)·g           v ← b2·v + (1 − b2)·g²
        w ← w − rate·(m̂/(√v̂ + eps) + weight_decay·w)

    with m̂ = m/(1 − b1ⁿ) and v̂ = v/(1 − b2ⁿ) in the n-th step. arXiv:1711.05101.

    Args:
        b1: decay of the first moment, from 0 to below 1; by default 0.9.
        b2: decay of the second moment, from 0 to below 1; by default 0.999. Lower values adapt
            faster when gradients change.
        eps: added to the root of the second moment, above 0; by default 1e-8.
        weight_decay: per step, times the learning rate; at least 0, and by default 0, as for DiT.

    Example:
        >>> import jax.numpy as jnp
        >>> step = AdamW()(optax.constant_schedule(2e-4)).transform
        >>> update, _ = step.update({"w": jnp.ones(1)}, step.init({"w": jnp.ones(1)}),
        ...                         {"w": jnp.ones(1)})
        >>> round(float(update["w"][0]), 6)
        -0.0002
    """

    b1: Decay[float] = 0.9
    b2: Decay[float] = 0.999
    eps: Positive[float] = 1e-8
    weight_decay: NotNegative[float] = 0.0

    def __call__(self, rate: optax.Schedule) -> Optimizer:
        step = optax.adamw(rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay)
        return Optimizer(step, rate, steps_of_rate=True)


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980): `AdamW` without weight decay.

        w ← w − rate·m̂/(√v̂ + eps)

    Args:
        b1: decay of the first moment, from 0 to below 1.
        b2: decay of the second moment, from 0 to below 1; EDM2 takes 0.99.
        eps: added to the root of the second moment, above 0.
    """

    b1: Decay[float] = 0.9
    b2: Decay[float] = 0.999
    eps: Positive[float] = 1e-8

    def __call__(self, rate: optax.Schedule) -> Optimizer:
        return AdamW(self.b1, self.b2, self.eps)(rate)
