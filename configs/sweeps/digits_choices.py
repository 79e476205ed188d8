"""Does the ranking of objectives depend on guidance and average, when each gets its best?

    python -m experiments.sweep --sweep=configs/sweeps/digits_choices.py --workers=2

Three objectives, three training seeds each, as many counted operations of training, sampled with
and without guidance and with either of two averages, at about 17 and 34 evaluations. One noise seed
chooses guidance and average of each arm, another one reports.

31 minutes on two cores of an Intel Xeon beside other work. All three arms choose guidance 1.5 and
the shorter average: Fréchet distance sd3 2.81 (2.15 to 3.46), v 3.49 and flow 3.59, from which six
seeds would separate it. The order is the same without guidance, 2.76, 3.61 and 3.97 at 17
evaluations; after 400 steps all samples are still coarse.
"""

from diffjax.sweeps.sweep import Sweep


def get_sweep() -> Sweep:
    """Axes: objective, seed."""
    return Sweep(
        "configs/digits.py",
        {"objective": ("flow", "sd3", "v"), "config.seed": (0, 1, 2)},
        {
            "config.num_steps": 400,
            "config.batch_size": 128,
            "config.optimizer.learning_rate": 2e-3,
            "config.evaluation.num_samples": 250,
            "config.evaluation.solvers": ("heun",),
            # Guidance doubles the evaluations: 5 and 9 steps with it cost what 9 and 18 do without.
            "config.evaluation.num_steps": (5, 9, 18),
            "config.evaluation.guidance_scales": (1.0, 1.5),
            # An average that is still warming up is the same for all longer ones: at step 400 none
            # is longer than 0.978 (`diffjax.training.state.update_ema`).
            "config.ema_decays": (0.9, 0.99),
            "config.weights": "ema-0.99",
            "config.evaluation.weights": ("ema-0.9", "ema-0.99"),
            "config.evaluation.seeds": (0, 1),
        },
        question="Which objective is best when each has its best guidance and average?",
        matched="flops",
    )
