"""What all optimizers share: clipped gradients, and a learning rate that rises and then falls."""

from collections.abc import Callable
from typing import Any

import optax

from diffjax.kinds import Limit, NotNegative
from diffjax.optimizers.adam import AdamW
from diffjax.optimizers.base import Optimizer, at_params, clip_by_norm
from diffjax.optimizers.schedules import Constant, Schedule, warmed_up

Rule = Callable[[optax.Schedule], Optimizer]
"""From a learning rate by step to an optimizer with it, as `AdamW`."""


def descent(
    num_steps: int,
    rule: Rule = AdamW(),
    learning_rate: NotNegative[float] = 1e-3,
    warmup_steps: NotNegative[int] = 100,
    schedule: Schedule = Constant(),
    clip_norm: Limit[float] = 1.0,
) -> Optimizer:
    """Descent by a rule along clipped gradients, with a rate that depends on the step.

        g ← g·min(1, clip_norm/|g|)         w ← rule(w, g, rate(step))

    Args:
        num_steps: training steps, the schedule's length.
        rule: from a gradient and a rate to an update.
        learning_rate: its peak, at least 0; it depends on the rule. AdamW: 1e-3 for small networks,
            1e-4 for DiT.
        warmup_steps: the n-th of them has n/warmup_steps of the peak; by default 100, 0 for none.
        schedule: the schedule of the rate after the warm-up.
        clip_norm: largest global norm of the gradient, above 0; by default 1. `inf` clips nothing.

    Example:
        >>> float(descent(1_000, learning_rate=2e-4, warmup_steps=4).schedule(1))
        9.999...e-05
    """
    optimizer = rule(warmed_up(schedule, learning_rate, warmup_steps, num_steps))
    transform, point = optimizer.transform, optimizer.gradient_point

    def of_rule(state: Any, params: Any) -> Any:
        return point(state[1], params)

    return optimizer._replace(
        transform=optax.chain(clip_by_norm(clip_norm), transform),
        gradient_point=at_params if point is at_params else of_rule,
    )
