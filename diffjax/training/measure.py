"""The evaluation of a run: from its weights to `evaluation.json`."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from diffjax import choices
from diffjax.data import DataSet, eval_batches
from diffjax.errors import UserError
from diffjax.evaluation import metrics
from diffjax.evaluation.evaluate import NamedRecipe, evaluate
from diffjax.evaluation.features import Extractor, check_images
from diffjax.evaluation.neighbours import nearest
from diffjax.evaluation.plots import save_png
from diffjax.sampling.sample import Recipe
from diffjax.spec import TARGET, build, choose
from diffjax.training import workdirs
from diffjax.training.found_grids import grids_for
from diffjax.training.generate import Asked, balanced_labels, check_finite, evaluations
from diffjax.training.interrupts import Interrupted
from diffjax.training.load import Run, weaker_models
from diffjax.training.processes import is_first
from diffjax.wiring import Wired

_NEIGHBOUR_ROWS = 10
_FEWEST_SAMPLES = 3


def measure(
    run: Run,
    dataset: DataSet,
    *,
    solvers: Sequence[str] | None = None,
    grids: Sequence[str] | None = None,
    num_steps: Sequence[int] | None = None,
    num_samples: int | None = None,
    guidance_scale: float | None = None,
    guidance: str | None = None,
    against: str | None = None,
    seed: int | None = None,
    weights: str | None = None,
    extractor: Extractor | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Evaluates a run and writes `evaluation.json` and `samples/neighbours.png` into its folder.

    What is not given is as in the run's config.

    Args:
        run: the model.
        dataset: what it was trained on.
        solvers: names, to be crossed with `grids` and `num_steps`.
        grids: names; with none the run's own.
        num_steps: intervals of the grid.
        num_samples: labels are spread evenly over them.
        guidance_scale: 1 is off.
        guidance: names of its parts, joined by "+".
        against: where its second prediction comes from.
        seed: of the noise.
        weights: `live` or the name of an average.
        extractor: what the distances are measured on.
        should_stop: asked between batches.
        report: called with each row of the table as it is done.

    Returns:
        What was written.

    Raises:
        UserError: an unknown solver, grid or average, images that the extractor can't take.
        Interrupted: `should_stop` said so; nothing is written.
    """
    settings = run.config.evaluation
    seed = int(settings.seed if seed is None else seed)
    guided = Guided(guidance_scale, guidance, against)
    main = named_recipe(run, guided=guided)
    # Runs of before there was a choice of grids have no list of them.
    others = [
        named_recipe(run, solver, grid, steps, guided)
        for solver, grid, steps in product(
            settings.solvers if solvers is None else solvers,
            (settings.get("grids") if grids is None else grids) or (None,),
            settings.num_steps if num_steps is None else num_steps,
        )
    ]
    params = run.weights(weights)
    reference = metrics.reference(dataset, extractor or build(settings.extractor))
    labels = balanced_labels(num_samples or settings.num_samples, dataset.num_classes)
    labels, source = samples_asked_of(run.setup.wired, dataset, labels)
    generate = run.generator(settings.batch_size)
    weaker = weaker_models(main.recipe, run.setup)(run.state)

    def draw(recipe: Recipe, labels: np.ndarray, seed: int) -> tuple[np.ndarray, int]:
        if should_stop():
            raise Interrupted(
                f"stopped while evaluating; the training in {run.workdir} is finished and saved, "
                "the same command evaluates it"
            )
        images = generate(params, recipe, labels, seed, source, weaker)
        asked = Asked(run.setup.wired, params, recipe, labels, seed, source, weaker)
        check_finite(images, asked)
        return images, evaluations(asked.only(np.arange(min(len(labels), settings.batch_size))))

    result = evaluate(
        draw,
        main,
        reference,
        labels=labels,
        conditional=dataset.num_classes > 0,
        seed=seed,
        others=others,
        report=report,
    )
    summary = {
        "step": run.step,
        "weights": weights or run.config.weights,
        **result.summary,
    }
    if is_first():
        _save_neighbours(run, reference.train_images, result.samples)
        write_json(run.workdir / workdirs.EVALUATION, summary)
    return summary


def samples_asked_of(
    wired: Wired, dataset: DataSet, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """The labels and sources of the samples that a run is judged by.

    Where samples start from noise they are the labels given. Where they start at a source, they
    are those of as many test images, evenly spaced, and each of them at most once.
    """
    if not wired.objective.starts_at_source:
        return labels, None
    parts = list(eval_batches(dataset.test, batch_size=1024, limit_images=len(labels)))
    return (
        np.concatenate([part["label"] for part in parts]),
        np.concatenate([part["source"] for part in parts if "source" in part]),
    )


def check_evaluation(config: ConfigDict, image_shape: tuple[int, int, int]) -> None:
    """Refuses an evaluation that could not run, before there is anything to evaluate.

    Raises:
        UserError: an unknown solver or grid, an extractor for other images, too few samples.
    """
    settings = config.evaluation
    for name in settings.solvers:
        choices.solver_called(name)
    for name in settings.get("grids", ()):
        choose(choices.GRIDS, name, "grid")
    extractor = build(settings.extractor)
    one_image = np.zeros((1, *image_shape), np.float32)
    check_images(one_image, extractor.image_shape, f"extractor {extractor.name}")
    if settings.num_samples < _FEWEST_SAMPLES:
        raise UserError(
            f"config.evaluation.num_samples={settings.num_samples} must be at least "
            f"{_FEWEST_SAMPLES}: a covariance needs that many"
        )


class Guided(NamedTuple):
    """What of a recipe's guidance is to be another, by name."""

    scale: float | None = None
    rule: str | None = None
    against: str | None = None


def named_recipe(
    run: Run,
    solver: str | None = None,
    grid: str | None = None,
    num_steps: int | None = None,
    guided: Guided = Guided(),
) -> NamedRecipe:
    """A run's recipe with some parts chosen by name.

    Raises:
        UserError: an unknown solver, grid or guidance, or no grid has been found yet.
    """
    saved = run.config.sampling
    solver_name = name_in(choices.SOLVERS, saved.solver) if solver is None else solver
    parts: dict[str, Any] = {}
    if solver is not None:
        parts["solver"] = choices.solver_called(solver)
    if num_steps is not None:
        parts["num_steps"] = num_steps
    if grid is not None:
        known = grids_for(run, solver_name, num_steps or run.recipe.num_steps)
        parts["grid"] = build(choose(known, grid, "grid"))
    if guided.scale is not None:
        parts["guidance_scale"] = guided.scale
    if guided.rule is not None:
        parts["guidance"] = build(choices.guidance_called(guided.rule))
    if guided.against is not None:
        parts["against"] = build(choices.against_called(guided.against))
    return NamedRecipe(
        solver_name,
        name_in(choices.GRIDS, saved.grid) if grid is None else grid,
        replace(run.recipe, **parts),
    )


def name_in(table: choices.Table, config: ConfigDict) -> str:
    """What tables call a part of a config: the row that it equals, else its callable's name."""
    same = (name for name, row in table.items() if row.to_dict() == config.to_dict())
    return next(same, config[TARGET].rpartition(":")[2])


def write_json(path: os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes a file that is there whole or not at all, whoever else writes it at the same time."""
    scratch = f"{os.fspath(path)}.{os.getpid()}.tmp"
    with open(scratch, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    os.replace(scratch, path)


def _save_neighbours(run: Run, train_images: np.ndarray, samples: np.ndarray) -> None:
    """One row a sample: itself, then its nearest training images."""
    samples = samples[:_NEIGHBOUR_ROWS]
    k = min(5, len(train_images))
    indices, _ = nearest(samples, train_images, k=k)
    rows = np.concatenate([samples[:, None], train_images[indices]], axis=1)
    path = run.workdir / "samples" / "neighbours.png"
    save_png(path, rows.reshape(-1, *samples.shape[1:]), columns=k + 1)
