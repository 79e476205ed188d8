"""Which objective makes the best digits for equal training, from 1 to 100 evaluations a sample?

    python -m experiments.sweep --sweep=configs/sweeps/digits_objectives.py --workers=2

Five objectives, three training seeds each, the same DiT and as many counted operations of training,
sampled without guidance, each on the grid that its path comes with. 16 minutes on two cores of an
Intel Xeon (28 of processor time). Fréchet distance at 17 evaluations, mean of three seeds: sd3
0.394, v 0.479 (not significantly different with three seeds), flow 0.519, edm 0.748, otcfm 0.962;
with one or two evaluations otcfm is the best. Noise prediction is learned by a U-Net:
`configs/sweeps/digits_noise_unet.py`.
"""

from diffjax.sweeps.sweep import Sweep


def get_sweep() -> Sweep:
    """Axes: objective, seed."""
    return Sweep(
        "configs/digits.py",
        {
            "objective": ("flow", "sd3", "otcfm", "v", "edm"),
            "config.seed": (0, 1, 2),
        },
        {
            "config.num_steps": 1_200,
            "config.sampling.guidance_scale": 1.0,
            "config.evaluation.num_samples": 500,
            "config.evaluation.solvers": ("ddim",),
            "config.evaluation.num_steps": (1, 2, 5, 10, 20, 50, 100),
        },
        question="Which objective makes the best digits for equal training?",
        matched="flops",
    )
