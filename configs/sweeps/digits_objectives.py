"""Which objective makes the best digits for equal training, from 1 to 100 evaluations a sample?

    python -m experiments.sweep --sweep=configs/sweeps/digits_objectives.py --workers=2

Six objectives, three training seeds each, the same DiT and as many counted operations of training,
sampled without guidance, each on the grid that its path comes with. 23 to 25 minutes on two cores
of an Intel Xeon (44 of processor time). Fréchet distance at 17 evaluations, mean of three seeds:
sd3 0.587, v 0.785 and flow 0.895 (not significantly different from sd3 with three seeds), edm
1.19, min_snr 5.71, ddpm 6.36; after 800 steps the last two still draw noise.
"""

from diffjax.sweeps.sweep import Sweep


def get_sweep() -> Sweep:
    """Axes: objective, model, seed."""
    return Sweep(
        "configs/digits.py",
        {
            "objective": ("flow", "sd3", "v", "edm", "ddpm", "min_snr"),
            "model": ("dit",),
            "config.seed": (0, 1, 2),
        },
        {
            "config.num_steps": 800,
            "config.batch_size": 128,
            "config.optimizer.learning_rate": 2e-3,
            "config.sampling.guidance_scale": 1.0,
            "config.evaluation.num_samples": 500,
            "config.evaluation.solvers": ("ddim",),
            "config.evaluation.num_steps": (1, 2, 5, 10, 20, 50, 100),
        },
        question="Which objective makes the best digits for equal training?",
        matched="flops",
    )
