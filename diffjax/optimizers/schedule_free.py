"""Schedule-free AdamW: an average of the steps in the place of a falling learning rate."""

from typing import Annotated, Any

import jax
import optax
from optax.contrib import schedule_free, schedule_free_eval_params

from diffjax.kinds import Decay, Limit, NotNegative, Positive, Range
from diffjax.optimizers.base import Optimizer, clip_by_norm
from diffjax.optimizers.schedules import Constant, Schedule, warmed_up


def schedule_free_adamw(
    num_steps: int,
    learning_rate: NotNegative[float] = 2.5e-3,
    warmup_steps: NotNegative[int] = 100,
    schedule: Schedule = Constant(),
    b1: Annotated[float, Range("(0, 1)")] = 0.9,
    b2: Decay[float] = 0.999,
    eps: Positive[float] = 1e-8,
    weight_decay: NotNegative[float] = 0.0,
    clip_norm: Limit[float] = 1.0,
) -> Optimizer:
    """AdamW whose weights are a running average of its steps (Defazio et al. 2024).

        y = (1 − b1)·z + b1·x                                       where the gradient g is taken
        z ← z − rate·(g/(√v̂ + eps) + weight_decay·y)                the steps
        x ← (1 − c)·x + c·z,   c = rate²/(sum of all rates² so far)    the average

    arXiv:2405.15682. The weights of a run (`live`) are x, the average, and those of
    `config.ema_decays` are averages of x; y and z are the optimizer's alone. Since x is an average
    already, `--config.weights=live` is the usual choice: an `ema-…` lags behind it.

    Args:
        num_steps: training steps; of no use to a constant rate.
        learning_rate: its peak, at least 0; one to ten times AdamW's.
        warmup_steps: the n-th of them has n/warmup_steps of the peak, and little weight in the
            average; 0 for none. 5 % of a run.
        schedule: of the rate after the warm-up; a constant one is what the method is for.
        b1: share of the average in the point of the gradient, above 0 and below 1; 0.9 to 0.98.
        b2: decay of the second moment, from 0 to below 1.
        eps: added to the root of the second moment, above 0.
        weight_decay: per step, times the learning rate, at y; at least 0.
        clip_norm: largest global norm of the gradient, above 0; `inf` clips nothing.
    """
    rate = warmed_up(schedule, learning_rate, warmup_steps, num_steps)
    steps = optax.chain(
        optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    # Optax counts from 1 where it weighs the average, and from 0 where it makes the steps.
    free = schedule_free(steps, lambda step: rate(step - 1), b1=b1)
    clip = clip_by_norm(clip_norm)

    def point(state: Any, x: Any) -> Any:
        return jax.tree.map(lambda x, z: b1 * x + (1.0 - b1) * z, x, state.z)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        y = point(state, params)
        gradient, _ = clip.update(updates, optax.EmptyState())
        moved, state = free.update(gradient, state, y)
        x = schedule_free_eval_params(state, optax.apply_updates(y, moved))
        return jax.tree.map(lambda new, old: new - old, x, params), state

    return Optimizer(optax.GradientTransformation(free.init, update), rate, point)
