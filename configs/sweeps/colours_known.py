"""A comparison whose outcome is known: three amounts of spoilt data, two equal ways to spoil them.

python -m experiments.sweep --sweep=configs/sweeps/colours_known.py --ensemble=5

19 minutes on two cores of an AMD EPYC beside other work (17 of processor time). Perfect training
would reach 0, 0.0011 and 0.0075; measured were 0.0003 and 0.0005, 0.0008 and 0.0009, 0.0053 and
0.0063. The two arms without blur do not differ significantly, as expected; with five seeds one arm
of blur 0.15 is significantly worse and one is not, of 0.25 both are.
"""

from diffjax.sweeps.sweep import Sweep


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
