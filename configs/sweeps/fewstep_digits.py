"""Which objective makes the best digits in 1, 2, 4 and 8 evaluations, for equal training?

    python -m experiments.sweep --sweep=configs/sweeps/fewstep_digits.py

Few-step objectives that need no teacher and no trained weights to begin with, and flow matching and
noise prediction: the same DiT, as many counted operations of training (a derivative and a second
evaluation are charged), three training seeds. Each is sampled by the solver that belongs to it,
without guidance. The settings of each are its defaults.
"""

from diffjax.sweeps.sweep import Sweep


def get_sweep() -> Sweep:
    """Axes: seed, model, objective."""
    return Sweep(
        "configs/digits.py",
        {
            "config.seed": (0, 1, 2),
            "model": ("dit",),
            "objective": (
                *("flow", "ddpm"),
                *("mean_flow", "imf", "pmf", "alpha_flow", "soflow", "shortcut", "flow_map", "tvm"),
                *("consistency", "ict", "scm", "imm", "drifting"),
            ),
        },
        {
            "config.num_steps": 1_200,
            "config.batch_size": 128,
            "config.optimizer.learning_rate": 2e-3,
            "config.sampling.guidance_scale": 1.0,
            "config.sampling.num_steps": 1,
            "config.evaluation.num_samples": 500,
            "config.evaluation.num_steps": (1, 2, 4, 8, 50),
        },
        question="Which objective makes the best digits in one evaluation, for equal training?",
        matched="flops",
    )
