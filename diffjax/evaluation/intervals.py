"""The confidence interval of a share."""

from math import sqrt


def wilson_interval(num_right: int, num_all: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927); z = 1.96 covers 95 %.

    Example:
        >>> tuple(round(end, 3) for end in wilson_interval(99, 100))
        (0.946, 0.998)
    """
    share = num_right / num_all
    centre = (share + z**2 / (2 * num_all)) / (1 + z**2 / num_all)
    spread = sqrt(share * (1 - share) / num_all + z**2 / (4 * num_all**2))
    half = z * spread / (1 + z**2 / num_all)
    return max(0.0, centre - half), min(1.0, centre + half)
