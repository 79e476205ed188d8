r"""Which objective makes the best clothes for equal training? Images of 28x28, larger runs.

    python -m experiments.sweep --sweep=configs/sweeps/fashion_objectives.py --workers=2 \
        --override=config.data.path=FOLDER

Four objectives, three training seeds each. FOLDER holds Fashion-MNIST's idx files (docs/data.md).
After any stop the same command resumes it: 58 minutes in two pieces, on two cores of an
Intel Xeon beside other work. Fréchet distance at 17 evaluations, mean of three seeds after 500
steps (floor 0.85): sd3 35.2, v 41.0, flow 41.6, edm 64.8, all three worse than the first.
"""

from diffjax.sweeps.sweep import Sweep

# 1.3 million parameters; the config's own network has 4.2 million.
SMALL = {"config.model.hidden_size": 128, "config.model.depth": 4, "config.model.num_heads": 4}


def get_sweep() -> Sweep:
    """Axes: objective, seed."""
    return Sweep(
        "configs/fashion_mnist.py",
        {
            "objective": ("flow", "sd3", "v", "edm"),
            "config.seed": (0, 1, 2),
        },
        {
            **SMALL,
            "config.num_steps": 500,
            "config.sampling.guidance_scale": 1.0,
            "config.evaluation.num_samples": 500,
            "config.evaluation.solvers": ("ddim",),
            "config.evaluation.num_steps": (2, 5, 10, 20, 50),
        },
        question="Which objective makes the best clothes for equal training?",
        matched="flops",
    )
