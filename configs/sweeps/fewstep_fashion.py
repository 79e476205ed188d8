r"""Which objective makes the best clothes in 1, 2, 4, 8 and 50 evaluations, for equal training?

    python -m experiments.sweep --sweep=configs/sweeps/fewstep_fashion.py --workers=2 \
        --override=config.data.path=FOLDER

As configs/sweeps/fewstep_digits.py, on images of 28x28. FOLDER holds Fashion-MNIST's idx files
(docs/data.md). Not yet run.
"""

from diffjax.sweeps.sweep import Sweep

# 1.3 million parameters; the config's own network has 4.2 million.
SMALL = {"config.model.hidden_size": 128, "config.model.depth": 4, "config.model.num_heads": 4}


def get_sweep() -> Sweep:
    """Axes: seed, model, objective."""
    return Sweep(
        "configs/fashion_mnist.py",
        {
            "config.seed": (0, 1, 2),
            "model": ("dit",),
            "objective": (
                *("flow", "ddpm"),
                *("mean_flow", "imf", "pmf", "alpha_flow", "soflow", "shortcut", "flow_map", "tvm"),
                *("facm", "consistency", "ict", "scm", "imm", "drifting"),
            ),
        },
        {
            **SMALL,
            "config.num_steps": 3_000,
            "config.batch_size": 64,
            "config.sampling.guidance_scale": 1.0,
            "config.sampling.num_steps": 1,
            "config.evaluation.num_samples": 500,
            "config.evaluation.num_steps": (1, 2, 4, 8, 50),
        },
        question="Which objective makes the best clothes in one evaluation, for equal training?",
        matched="flops",
    )
