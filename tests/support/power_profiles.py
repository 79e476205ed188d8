"""The weights of all steps in a power-function average, in double precision."""

import numpy as np

from diffjax.training.averages import gamma_of


def weights_of_steps(length: float, t: int) -> np.ndarray:
    """`[t]`: the integral of (γ + 1)·τ^γ/t^(γ+1) over (i − 1, i], for i = 1, …, t."""
    edges = (np.arange(t + 1) / t) ** (gamma_of(length) + 1)
    return np.diff(edges)
