"""The objectives of digits that predict noise, with a U-Net.

    python -m experiments.sweep --sweep=configs/sweeps/digits_noise_unet.py

The DiT of `digits_every_objective.py` is far from done with them after as many steps.
"""

from diffjax.sweeps.sweep import Sweep


def get_sweep() -> Sweep:
    """Axes: objective."""
    return Sweep(
        "configs/digits.py",
        {
            "objective": ("ddpm", "min_snr", "vdm", "score_ve", "iddpm", "p2", "score_sub_vp"),
            "model": ("unet",),
        },
        {
            "config.num_steps": 1_200,
            "config.batch_size": 128,
            "config.optimizer.learning_rate": 2e-3,
            "config.sampling.guidance_scale": 1.5,
            "config.evaluation.solvers": ("ddim", "heun"),
            "config.evaluation.grids": ("uniform", "karras"),
            "config.evaluation.num_steps": (9,),
        },
    )
