"""Averages of the parameters over training: exponential ones, and EDM2's power-function averages.

A power-function average (Karras et al. 2024, arXiv:2312.02696, section 3) weighs the parameters
after step τ, seen from step t, by

    p(τ) = (γ + 1)·τ^γ/t^(γ+1)        for 0 < τ ≤ t

It forgets the beginning, and its width grows with the run: its *length* is the standard deviation
of p over t, a number that does not depend on t. From averages of two lengths, stored as snapshots,
an average of any length is reconstructed after training (`diffjax.runs.averages`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

LONGEST = 0.2886
"""Just below 1/√12, the length of the mean over all steps (γ = 0)."""


@dataclass(frozen=True)
class Averages:
    """Which averages of the parameters a run keeps.

    Args:
        decays: the decay rates of exponential ones; 0.999 to 0.9999 is usual, less for short runs.
        lengths: the lengths of power-function ones, above 0 and up to `LONGEST`; EDM2 keeps (0.05,
            0.10).
        rampup_ratio: r, how exponential ones begin: their half-life is at most r times the steps
            made so far; 0.05 in EDM. 0 for the rule of TensorFlow and DDPM, see `update`.

    Example:
        >>> Averages((0.999,), (0.05, 0.1)).names
        ('ema-0.999', 'power-0.05', 'power-0.1')
    """

    decays: Sequence[float] = ()
    lengths: Sequence[float] = ()
    rampup_ratio: float = 0.0

    @classmethod
    def of(cls, config: ConfigDict) -> "Averages":
        """Those of `config.ema_decays` and `config.ema_lengths`, with `config.ema_rampup_ratio`."""
        return cls(config.ema_decays, config.ema_lengths, config.ema_rampup_ratio)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of their weights, in the user's order."""
        return (*map(ema_name, self.decays), *map(power_name, self.lengths))

    def init(self, params: Any) -> dict[str, Any]:
        """Averages before the first step: the parameters, each a copy of its own."""
        # The step donates its state, and two names of one buffer can't both be donated.
        return {name: jax.tree.map(jnp.copy, params) for name in self.names}

    def update(self, averages: dict[str, Any], params: Any, step: Array) -> dict[str, Any]:
        """The averages after one more step.

            exponential:      a ← d·a + (1 − d)·params,  d = min(decay, (1 + n)/(10 + n)),
                              or with a ratio r          d = min(decay, 2^(−1/(r·n)))
            power-function:   a ← β·a + (1 − β)·params,  β = (1 − 1/t)^(γ+1), t = n + 1

        The second term in d keeps the first steps, when parameters move fast, out of the average;
        β is 0 in the first step.

        Args:
            averages: as `init` or an earlier `update` returned them.
            params: after the step.
            step: n, `[]` int32, updates made before it.
        """
        step = step.astype(jnp.float32)

        def exponential(decay: float) -> Any:
            first = (1.0 + step) / (10.0 + step)
            if self.rampup_ratio:
                # 2^(−∞) in step 0: the average is what the first step makes.
                first = jnp.exp2(-1.0 / (self.rampup_ratio * step))
            d = jnp.minimum(decay, first)
            return jax.tree.map(
                lambda old, new: old + (1.0 - d) * (new - old), averages[ema_name(decay)], params
            )

        def power(length: float) -> Any:
            # 1 − β, without the rounding of a difference from 1.
            share = -jnp.expm1((gamma_of(length) + 1.0) * jnp.log1p(-1.0 / (step + 1.0)))
            return jax.tree.map(
                lambda old, new: old + share * (new - old), averages[power_name(length)], params
            )

        return {
            **{ema_name(decay): exponential(decay) for decay in self.decays},
            **{power_name(length): power(length) for length in self.lengths},
        }


def ema_name(decay: float) -> str:
    """The name of an exponential average.

    Example:
        >>> ema_name(0.999)
        'ema-0.999'
    """
    return f"ema-{decay:g}"


def power_name(length: float) -> str:
    """The name of a power-function average.

    Example:
        >>> power_name(0.10)
        'power-0.1'
    """
    return f"power-{length:g}"


def gamma_of(length: float) -> float:
    """The exponent γ of the power-function average of a length.

    It solves `length² = (γ + 1)/((γ + 2)²·(γ + 3))`, the variance of p over t², which falls with γ
    from 1/12 at γ = 0.

    Args:
        length: above 0 and up to `LONGEST`.

    Example:
        >>> round(gamma_of(0.05), 3), round(gamma_of(0.10), 3)
        (16.972, 6.937)
    """
    t = float(length) ** -2
    # (γ + 2)²·(γ + 3) − t·(γ + 1), by powers of γ.
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())
