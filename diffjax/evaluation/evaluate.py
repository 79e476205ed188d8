"""Evaluates one model with several sampling recipes: quality against network evaluations (NFE)."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffjax.evaluation import metrics
from diffjax.evaluation.image_statistics import Batches
from diffjax.evaluation.metrics import Reference
from diffjax.sampling.sample import Recipe


@dataclass(frozen=True)
class NamedRecipe:
    """A sampling recipe with the names of its parts for tables.

    Attributes:
        solver: name of the solver.
        grid: name of the time grid.
        recipe: the recipe.
        weights: name of the weights to sample with, `live` or an average.
        seed: seed of the noise.
    """

    solver: str
    grid: str
    recipe: Recipe
    weights: str = "live"
    seed: int = 0


Draw = Callable[[NamedRecipe], tuple[np.ndarray | Batches, int]]
"""`recipe -> images[n, H, W, C], network evaluations per sample`."""


@dataclass(frozen=True)
class EvaluationResult:
    """The result of `evaluate`.

    Attributes:
        summary: plain data for `evaluation.json`: the main recipe's numbers with provenance, and
            one row for each recipe under `by_nfe`.
        samples: the first samples of the main recipe, `[B, H, W, C]`.
    """

    summary: dict[str, Any]
    samples: np.ndarray


def evaluate(
    draw: Draw,
    recipes: Sequence[NamedRecipe],
    references: Sequence[Reference],
    *,
    labels: np.ndarray | None,
    texts: Sequence[str] | None = None,
    report: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> EvaluationResult:
    """Computes all metrics for the first recipe, and accuracy and distances for the others.

    All recipes have the same conditions, and those with one seed start from the same noise.

    Args:
        draw: draws samples of a recipe, and returns them with the evaluations per sample.
        recipes: the run's own, and further ones; repeated ones are skipped.
        references: the real data with extractors. The metrics of the first are those of the
            evaluation; those of the others are for the first recipe only, under `extractors`, by
            name. CLIP score and retrieval accuracy are those of the first that reads texts.
        labels: `[n]`, the class on which each sample is conditioned; None for samples without
            classes, which have no accuracy.
        texts: n of them, what each sample is to show; None where there are none.
        report: called with each finished row.
    """
    began, (main, *others) = time.perf_counter(), distinct(recipes)
    samples, row, found = _measure(draw, main, references, labels, texts, all_metrics=True)
    full = found[0]
    report(row)
    rows = [row]
    reading = [real for real in references[1:] if texts is not None and real.extractor.texts]
    in_short = [references[0], *reading[:1]]
    for other in others:
        _, another, _ = _measure(draw, other, in_short, labels, texts, all_metrics=False)
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
        **full,
        "extractors": {
            real.extractor.name: {**numbers, "neighbours": None}  # of pixels: they are above
            for real, numbers in zip(references[1:], found[1:], strict=True)
        },
        "seconds": time.perf_counter() - began,
        "by_nfe": rows,
    }
    return EvaluationResult(summary, samples)


def distinct(recipes: Sequence[NamedRecipe]) -> list[NamedRecipe]:
    """The recipes in their order, without those that occurred before."""
    found: dict[tuple, NamedRecipe] = {}
    for each in recipes:
        found.setdefault(tuple(_how(each).items()), each)
    return list(found.values())


def _measure(
    draw: Draw,
    named: NamedRecipe,
    references: Sequence[Reference],
    labels: np.ndarray | None,
    texts: Sequence[str] | None,
    *,
    all_metrics: bool,
) -> tuple[np.ndarray, dict[str, Any], list[dict[str, Any]]]:
    """Draws samples; returns the first of them, the table row, and the metrics by extractor."""
    began = time.perf_counter()
    drawn, nfe = draw(named)
    seconds = [time.perf_counter() - began]
    batches = drawn if isinstance(drawn, Batches) else Batches.of(drawn)
    first, samples = Batches(batches.num_images, _timed(batches, seconds)).peek()
    found = metrics.compare_each(samples, labels, references, texts=texts, all_metrics=all_metrics)
    full = found[0]
    for name in ("clip_score", "retrieval_accuracy"):
        full[name] = next((each[name] for each in found if each[name]), None)
    row = {
        **_how(named),
        "nfe": nfe,
        "accuracy": full["accuracy"],
        "frechet_distance": full["frechet_distance"]["value"],
        "kernel_distance": full["kernel_distance"]["value"],
        "clip_score": full["clip_score"] and full["clip_score"]["value"],
        "retrieval_accuracy": full["retrieval_accuracy"] and full["retrieval_accuracy"]["value"],
        "seconds": sum(seconds) + batches.earlier_seconds(),
    }
    return first, row, found


def _timed(images: Batches, seconds: list[float]) -> Iterator[np.ndarray]:
    """Yields the batches, and appends to `seconds` how long each took."""
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
