"""One model, several recipes: quality against the number of network evaluations."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffjax.evaluation import metrics
from diffjax.evaluation.metrics import Reference
from diffjax.evaluation.seen import Batches
from diffjax.sampling.sample import Recipe


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe and what tables call its parts, whose weights walk it, and from which noise."""

    solver: str
    grid: str
    recipe: Recipe
    weights: str = "live"
    seed: int = 0


Draw = Callable[[NamedRecipe, np.ndarray], tuple[np.ndarray | Batches, int]]
"""`(recipe, labels[n]) -> images[n, H, W, C], network evaluations per sample`."""


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        summary: plain data for `evaluation.json`: the main recipe's numbers with provenance, and
            one row a recipe under `by_nfe`.
        samples: the first of the main recipe, `[B, H, W, C]`.
    """

    summary: dict[str, Any]
    samples: np.ndarray


def evaluate(
    draw: Draw,
    main: NamedRecipe,
    reference: Reference,
    *,
    labels: np.ndarray,
    conditional: bool,
    others: Sequence[NamedRecipe] = (),
    report: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> Evaluation:
    """Measures the main recipe in full, and each of the others in short.

    All recipes have the same labels, and those of one seed start from the same noise.

    Args:
        draw: samples, and what they cost.
        main: the recipe that the run is judged by.
        reference: the real data and the features.
        labels: `[n]`, one for each sample.
        conditional: whether they mean anything; if not, no accuracy is measured.
        others: those equal to the main one are passed over.
        report: called with each row as it is done.
    """
    began = time.perf_counter()
    samples, row, full = _measure(draw, main, reference, labels, conditional, True)
    report(row)
    rows = [row]
    for other in others:
        if _how(other) != _how(main):
            _, another, _ = _measure(draw, other, reference, labels, conditional, False)
            report(another)
            rows.append(another)
    rows.sort(key=lambda row: (row["solver"], row["grid"], row["nfe"], row["seed"]))
    recipe = main.recipe
    sampling = {
        "solver": main.solver,
        "grid": repr(recipe.grid),
        "grid_name": main.grid,
        "num_steps": recipe.num_steps,
        "nfe": row["nfe"],
        "guidance_scale": recipe.guidance_scale,
        "guidance": repr(recipe.guidance),
        "against": repr(recipe.against),
        "seed": main.seed,
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
    draw: Draw,
    named: NamedRecipe,
    reference: Reference,
    labels: np.ndarray,
    conditional: bool,
    in_depth: bool,
) -> tuple[np.ndarray, dict[str, Any], dict[str, Any]]:
    """The first samples, their row in the table, and all that is known about all of them."""
    began = time.perf_counter()
    drawn, nfe = draw(named, labels)
    seconds = [time.perf_counter() - began]
    batches = drawn if isinstance(drawn, Batches) else Batches.of(drawn)
    first, samples = Batches(batches.num_images, _timed(batches, seconds)).peek()
    full = metrics.compare(samples, labels if conditional else None, reference, in_depth=in_depth)
    row = {
        **_how(named),
        "nfe": nfe,
        "accuracy": full["accuracy"],
        "frechet_distance": full["frechet_distance"]["value"],
        "kernel_distance": full["kernel_distance"]["value"],
        "seconds": sum(seconds),
    }
    return first, row, full


def _timed(images: Batches, seconds: list[float]) -> Iterator[np.ndarray]:
    """The batches; how long each took to come is noted down."""
    batches = iter(images.batches)
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        seconds.append(time.perf_counter() - began)
        if batch is None:
            return
        yield batch


def _how(named: NamedRecipe) -> dict[str, Any]:
    return {
        "solver": named.solver,
        "grid": named.grid,
        "num_steps": named.recipe.num_steps,
        "guidance_scale": named.recipe.guidance_scale,
        "weights": named.weights,
        "seed": named.seed,
    }
