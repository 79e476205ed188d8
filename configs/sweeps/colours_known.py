"""A comparison whose outcome is known: three amounts of spoilt data, two equal ways to spoil them.

python -m experiments.sweep --sweep=configs/sweeps/colours_known.py --ensemble=5

Not yet run as a whole. Single runs of 2,000 steps gave Fréchet distances of 0.0001, 0.0008, 0.0057
where perfect training gives 0, 0.0011 and 0.0075.
"""

from diffjax.sweeps import Sweep


def get_sweep() -> Sweep:
    """Axes: blur, along, seed; `along` makes no difference (`diffjax.data.colours`)."""
    return Sweep(
        "configs/colours.py",
        {
            "config.data.blur": (0.0, 0.15, 0.25),
            "config.data.along": (0, 1),
            "config.seed": (0, 1, 2, 3, 4),
        },
        question="Is spoilt data seen? The more blur the worse; which channel it hits is the same.",
    )
