"""An interval that ends where its number can't be has ends of unlike distances."""

import pytest

from diffjax.comparison.arms import Way, compare_arms
from diffjax.reports.sweep_text import quality_markdown

ROW = {"solver": "heun", "grid": "uniform", "num_steps": 2, "nfe": 3}


def cell(metric, *values):
    """Of one solver and arm, with as many training seeds."""
    names = [f"a-{i}" for i in range(len(values))]
    results = {
        name: {"weights": "live", "by_nfe": [{**ROW, "frechet_distance": value, metric: value}]}
        for name, value in zip(names, values, strict=True)
    }
    found = compare_arms(results, dict.fromkeys(names, "a"), metric=metric)
    assert list(found.standings) == [Way("heun", 3)]
    return quality_markdown(found).splitlines()[2].split(" | ")[2].removesuffix(" |")


@pytest.mark.parametrize(
    ("metric", "values", "text"),
    [
        # Student's 97.5 % quantile of one degree is 12.706: 2 ± 12.706·√2/√2, and none below 0.
        ("frechet_distance", (1.0, 3.0), "2.00 (0.00 to 14.7)"),
        # Of two degrees 4.3027: 2 ± 4.3027/√3, and it can be below 0.
        ("kernel_distance", (1.0, 2.0, 3.0), "2.00 (-0.484 to 4.48)"),
        ("frechet_distance", (2.0,), "2.00"),
    ],
)
def test_both_ends_are_told(metric, values, text):
    assert cell(metric, *values) == text
