"""Schedule-free AdamW: an average of the steps in the place of a falling learning rate."""

from dataclasses import dataclass
from typing import Annotated, Any

import jax
import optax
from optax.contrib import schedule_free, schedule_free_eval_params

from diffjax.kinds import Decay, NotNegative, Positive, Range
from diffjax.optimizers.base import Optimizer


@dataclass(frozen=True)
class ScheduleFreeAdamW:
    """AdamW whose weights are a running average of its steps (Defazio et al. 2024).

        y = (1 − b1)·z + b1·x                                       where the gradient g is taken
        z ← z − rate·(g/(√v̂ + eps) + weight_decay·y)                the steps
        x ← (1 − c)·x + c·z,   c = rate²/(sum of all rates² so far)    the average

    arXiv:2405.15682. The weights of a run (`live`) are x, the average, and those of
    `config.ema_decays` are averages of x; y and z are the optimizer's alone. Since x is an average
    already, `--config.weights=live` is the usual choice: an `ema-…` lags behind it.

    It is made for a constant schedule. The peak is one to ten times AdamW's, and the steps of the
    warm-up, 5 % of a run, have little weight in the average.

    Args:
        b1: share of the average in the point of the gradient, above 0 and below 1; 0.9 to 0.98.
        b2: decay of the second moment, from 0 to below 1.
        eps: added to the root of the second moment, above 0.
        weight_decay: per step, times the learning rate, at y; at least 0.
    """

    b1: Annotated[float, Range("(0, 1)")] = 0.9
    b2: Decay[float] = 0.999
    eps: Positive[float] = 1e-8
    weight_decay: NotNegative[float] = 0.0

    def __call__(self, rate: optax.Schedule) -> Optimizer:
        steps = optax.chain(
            optax.scale_by_rms(self.b2, self.eps, eps_in_sqrt=False, bias_correction=True),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
        # Optax counts from 1 where it weighs the average, and from 0 where it makes the steps.
        free = schedule_free(steps, lambda step: rate(step - 1), b1=self.b1)

        def point(state: Any, x: Any) -> Any:
            return jax.tree.map(lambda x, z: self.b1 * x + (1.0 - self.b1) * z, x, state.z)

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            y = point(state, params)
            moved, state = free.update(updates, state, y)
            x = schedule_free_eval_params(state, optax.apply_updates(y, moved))
            return jax.tree.map(lambda new, old: new - old, x, params), state

        return Optimizer(optax.GradientTransformation(free.init, update), rate, point)
