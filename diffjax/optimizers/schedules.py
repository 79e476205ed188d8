"""Learning rates by step: a linear warm-up, then constant, cosine or inverse square root."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import optax

from diffjax.kinds import AtLeastOne, NotNegative, Probability

Schedule = Callable[[Any, int, int], Any]
"""`(peak, warmup_steps, num_steps) -> rate`, where `rate(n)` is that of the n-th step after the
warm-up, from 0."""


def warmed_up(schedule: Schedule, peak: Any, warmup_steps: int, num_steps: int) -> optax.Schedule:
    """A linear rise to the peak, then a schedule.

        rate(n) = peak·(n + 1)/warmup_steps     for step n = 0, …, warmup_steps − 1

    The first step is number 0, and its rate is above 0. A run that is shorter than the warm-up ends
    on the way to the peak.

    Args:
        schedule: what follows the warm-up.
        peak: the largest rate, at least 0; it may be traced.
        warmup_steps: steps of the rise; 0 starts at the peak.
        num_steps: steps of the whole run.

    Example:
        >>> rate = warmed_up(Constant(), 0.5, warmup_steps=2, num_steps=10)
        >>> [float(rate(n)) for n in (0, 1, 2, 9)]
        [0.25, 0.5, 0.5, 0.5]
    """

    def warmup(step: Any) -> Any:
        return peak * (step + 1) / max(warmup_steps, 1)

    return optax.join_schedules([warmup, schedule(peak, warmup_steps, num_steps)], [warmup_steps])


@dataclass(frozen=True)
class Constant:
    """The peak, up to the end of the run.

    Usual where weights are averaged: an average does what a falling rate does. It is also what
    schedule-free optimizers are made for.

    Example:
        >>> Constant()(0.1, 100, 1000)(500)
        0.1
    """

    def __call__(self, peak: Any, warmup_steps: int, num_steps: int) -> optax.Schedule:
        del warmup_steps, num_steps
        return optax.constant_schedule(peak)


@dataclass(frozen=True)
class RiseFromZero:
    """A linear rise from 0, then the peak: the rate of EDM, DDPM and others' published trainings.

        rate(n) = peak·min(n/steps, 1)

    The first step, n = 0, changes nothing. It is the whole schedule, for `warmup_steps = 0`; the
    rise of `warmup_steps` is one step ahead of it, so that each step counts.

    Args:
        steps: the number of steps of the rise; 5,000 in DDPM, 10 million images in EDM.

    Example:
        >>> rate = RiseFromZero(4)(1.0, 0, 100)
        >>> [float(rate(n)) for n in (0, 1, 4, 50)]
        [0.0, 0.25, 1.0, 1.0]
    """

    steps: AtLeastOne[int] = 5_000

    def __call__(self, peak: Any, warmup_steps: int, num_steps: int) -> optax.Schedule:
        del warmup_steps, num_steps
        return optax.linear_schedule(0.0, peak, self.steps)


@dataclass(frozen=True)
class Cosine:
    """Half a period of a cosine, from the peak down (Loshchilov & Hutter 2017, arXiv:1608.03983).

        rate(n) = peak·(f + (1 − f)·(1 + cos(π·n/N))/2),  N = num_steps − warmup_steps

    Args:
        final_fraction: f, the share of the peak that is left at the end, from 0 to 1; by
            default 0.

    Example:
        >>> rate = Cosine(final_fraction=0.1)(2.0, 0, 100)
        >>> [round(float(rate(n)), 3) for n in (0, 50, 100)]
        [2.0, 1.1, 0.2]
    """

    final_fraction: Probability[float] = 0.0

    def __call__(self, peak: Any, warmup_steps: int, num_steps: int) -> optax.Schedule:
        steps = max(num_steps - warmup_steps, 1)
        return optax.cosine_decay_schedule(peak, steps, self.final_fraction)


@dataclass(frozen=True)
class InverseSqrt:
    """The peak, and from step r on a fall with the root of the step; the end is not needed.

        rate(n) = peak/√max(1, n/r),  n counted from the run's first step

    With r the end of the warm-up it is that of Vaswani et al. 2017 (arXiv:1706.03762). EDM2 (Karras
    et al. 2024, arXiv:2312.02696) stays at the peak for longer, r = 35,000 to 70,000 steps of 2,048
    images, and takes power-function averages (`config.ema_lengths`).

    Args:
        constant_steps: r; values below `warmup_steps`, such as the default 0, mean the end of the
            warm-up.

    Example:
        >>> rate = InverseSqrt()(1.0, 100, 10_000)
        >>> [round(float(rate(n)), 3) for n in (0, 300, 800)]  # steps 100, 400 and 900
        [1.0, 0.5, 0.333]
    """

    constant_steps: NotNegative[int] = 0

    def __call__(self, peak: Any, warmup_steps: int, num_steps: int) -> optax.Schedule:
        del num_steps
        reference = max(self.constant_steps, warmup_steps, 1)

        def rate(n: Any) -> Any:
            return peak * math.sqrt(reference) / jnp.sqrt(jnp.maximum(n + warmup_steps, reference))

        return rate
