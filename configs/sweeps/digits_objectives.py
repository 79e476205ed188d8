"""Every objective that makes digits from noise, one run each.

    python -m experiments.sweep --sweep=configs/sweeps/digits_objectives.py

The table is in docs/objectives.md.
"""

from diffjax.choices import OBJECTIVES
from diffjax.sweeps import Sweep

# They need pairs of images, and have configs of their own.
PAIRS = ("reflow", "translation", "bridge")


def get_sweep() -> Sweep:
    """Axes: objective."""
    return Sweep(
        "configs/digits.py",
        {"objective": tuple(name for name in OBJECTIVES if name not in PAIRS)},
        {
            "config.evaluation.solvers": ("ddim", "heun"),
            "config.evaluation.grids": ("uniform", "karras"),
            "config.evaluation.num_steps": (9, 18),
        },
    )
