"""Which named targets do not go with which named paths."""

import itertools

# Where the signal is gone, noise and score can't be decoded; sub-VP has hardly any noise at t_min.
ILLEGAL = {
    *itertools.product(
        ("linear", "linear_shifted", "linear_twice_noise", "ddpm_table_zero_snr"),
        ("noise", "score", "scaled_score"),
    ),
    ("sub_vp", "clean"),
}
