"""One model, several recipes: quality against the number of network evaluations."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffjax.evaluation import metrics
from diffjax.evaluation.metrics import Reference
from diffjax.sampling.sample import Recipe
from diffjax.sampling.solvers import Solver


@dataclass(frozen=True)
class NamedSolver:
    """A solver and what tables call it."""

    name: str
    solver: Solver


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        summary: plain data for `evaluation.json`: the main recipe's numbers with provenance, and
            one row a recipe under `by_nfe`.
        samples: of the main recipe, `[N, H, W, C]`.
    """

    summary: dict[str, Any]
    samples: np.ndarray


def evaluate(
    draw: Callable[[Recipe, np.ndarray, int], np.ndarray],
    recipe: Recipe,
    solver_name: str,
    reference: Reference,
    *,
    labels: np.ndarray,
    conditional: bool,
    seed: int,
    solvers: Sequence[NamedSolver] = (),
    num_steps: Sequence[int] = (),
    report: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> Evaluation:
    """Measures the main recipe in full, and each solver at each number of steps in short.

    All recipes start from the same noise and labels.

    Args:
        draw: `(recipe, labels[n], seed) -> images[n, H, W, C]`.
        recipe: the main one.
        solver_name: of the main one.
        reference: the real data and the features.
        labels: `[n]`, one for each sample.
        conditional: whether they mean anything; if not, no accuracy is measured.
        seed: of the noise.
        solvers: to be crossed with `num_steps`; grid and guidance are the main recipe's.
        num_steps: intervals of the grid.
        report: called with each row as it is done.
    """
    began = time.perf_counter()
    samples, row, full = _measure(draw, recipe, solver_name, reference, labels, conditional, seed)
    report(row)
    rows = [row]
    for named in solvers:
        for steps in num_steps:
            if (named.name, steps) == (solver_name, recipe.num_steps):
                continue
            other = replace(recipe, solver=named.solver, num_steps=steps)
            _, row, _ = _measure(draw, other, named.name, reference, labels, conditional, seed)
            report(row)
            rows.append(row)
    rows.sort(key=lambda row: (row["solver"], row["nfe"]))
    sampling = {
        "solver": solver_name,
        "grid": repr(recipe.grid),
        "num_steps": recipe.num_steps,
        "nfe": recipe.nfe,
        "guidance_scale": recipe.guidance_scale,
        "seed": seed,
    }
    summary = {
        "sampling": sampling,
        "num_samples": len(labels),
        **full,
        "seconds": time.perf_counter() - began,
        "by_nfe": rows,
    }
    return Evaluation(summary, samples)


def _measure(
    draw: Callable[[Recipe, np.ndarray, int], np.ndarray],
    recipe: Recipe,
    solver_name: str,
    reference: Reference,
    labels: np.ndarray,
    conditional: bool,
    seed: int,
) -> tuple[np.ndarray, dict[str, Any], dict[str, Any]]:
    """Samples, their row in the table, and all that is known about them."""
    began = time.perf_counter()
    samples = draw(recipe, labels, seed)
    seconds = time.perf_counter() - began
    full = metrics.compare(samples, labels if conditional else None, reference)
    row = {
        "solver": solver_name,
        "num_steps": recipe.num_steps,
        "nfe": recipe.nfe,
        "guidance_scale": recipe.guidance_scale,
        "accuracy": full["accuracy"],
        "frechet_distance": full["frechet_distance"]["value"],
        "kernel_distance": full["kernel_distance"]["value"],
        "seconds": seconds,
    }
    return samples, row, full
