"""The results of a sweep's runs side by side."""

from collections.abc import Mapping
from typing import Any

from diffjax.evaluation.provenance import check_comparable
from diffjax.evaluation.tables import measure, percent


def sweep_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table: a row a run, and its Fréchet distance by each recipe that runs share.

    Accuracy, where it was measured, is that of the run's own recipe.

    Args:
        results: the content of each run's `evaluation.json`, by the run's name.

    Raises:
        UserError: runs whose distances were measured in unlike ways (`check_comparable`).

    Example:
        >>> row = {"solver": "heun", "grid": "uniform", "num_steps": 9, "nfe": 34,
        ...        "guidance_scale": 1.5, "frechet_distance": 0.58}
        >>> print(sweep_table({"flow": {"accuracy": 0.99, "by_nfe": [row]}}))
        | run | accuracy | heun, uniform, NFE 34 |
        |---|---|---|
        | flow | 99.0 % | 0.580 |
        <BLANKLINE>
    """
    check_comparable(results, "frechet_distance")
    rows = {name: {_recipe(row): row for row in r["by_nfe"]} for name, r in results.items()}
    recipes = sorted({recipe for found in rows.values() for recipe in found})
    lines = [["run", "accuracy", *(f"{s}, {grid}, NFE {nfe}" for s, grid, nfe in recipes)]]
    for name, found in rows.items():
        distances = [measure(found.get(recipe, {}).get("frechet_distance")) for recipe in recipes]
        lines.append([name, percent(results[name].get("accuracy")), *distances])
    written = [f"| {' | '.join(line)} |\n" for line in lines]
    return "".join([written[0], "|---" * len(lines[0]) + "|\n", *written[1:]])


def _recipe(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row["solver"], row["grid"], row["nfe"]
