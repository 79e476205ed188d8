"""Do three ways to train a flow differ on digits? Three seeds each.

    python -m experiments.sweep --sweep=configs/sweeps/digits_seeds.py

Nine runs of about two minutes on two idle cores of an AMD EPYC. Not yet run as a whole.
"""

from diffjax.sweeps import Sweep


def get_sweep() -> Sweep:
    """Axes: objective, seed."""
    return Sweep(
        "configs/digits.py",
        {"objective": ("flow", "v", "sd3"), "config.seed": (0, 1, 2)},
        {"config.evaluation.solvers": ("ddim",), "config.evaluation.num_steps": (9,)},
    )
