"""Every denoiser that makes digits from noise, one run each.

    python -m experiments.sweep --sweep=configs/sweeps/digits_every_objective.py

About an hour on two cores of an AMD EPYC. Fréchet distances from 0.31 (`edm2`) to 0.8 for
velocity, v and F; those that predict noise are not done after as many steps. The table is in
docs/objectives.md.
"""

from diffjax.choices import OBJECTIVES
from diffjax.sweeps.sweep import Sweep

# They need pairs of images, and have configs of their own. Objectives of few steps need other
# solvers, and some of them a teacher.
PAIRS = ("reflow", "translation", "bridge")
NAMES = tuple(
    name
    for name, parts in OBJECTIVES.items()
    if parts["loss"] in ("denoising", "interpolant") and name not in PAIRS
)


def get_sweep() -> Sweep:
    """Axes: objective, model."""
    return Sweep(
        "configs/digits.py",
        {"objective": NAMES, "model": ("dit",)},
        {
            "config.num_steps": 1_200,
            "config.batch_size": 128,
            "config.optimizer.learning_rate": 2e-3,
            "config.sampling.guidance_scale": 1.5,
            "config.evaluation.solvers": ("ddim", "heun"),
            "config.evaluation.grids": ("uniform", "karras"),
            "config.evaluation.num_steps": (9, 18),
        },
    )
