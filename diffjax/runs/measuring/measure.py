"""Evaluates a run: draws samples, measures them and writes `evaluation.json`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count, product
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffjax import choices
from diffjax.comparison.results import LIKELIHOOD
from diffjax.data import DataSet
from diffjax.errors import UserError, nearest
from diffjax.evaluation import cached_arrays, metrics
from diffjax.evaluation.evaluate import Draw, NamedRecipe, distinct, evaluate
from diffjax.evaluation.extractors.features import Extractor, check_images
from diffjax.evaluation.image_statistics import Batches, ImageSet
from diffjax.evaluation.reference import MAX_IMAGES
from diffjax.evaluation.scores import neighbours
from diffjax.evaluation.scores.distances import FEWEST_IMAGES
from diffjax.evaluation.scores.label_mix import proportional_labels
from diffjax.host.files import write_json
from diffjax.host.interrupts import Interrupted, stop_at_once
from diffjax.host.processes import is_first
from diffjax.host.progress import Progress, progress
from diffjax.host.run_files import read_json
from diffjax.host.storage import translate_storage_errors
from diffjax.kinds import AtLeastOne, NumSteps
from diffjax.reports.pictures import save_png
from diffjax.runs import workdirs
from diffjax.runs.load import Run
from diffjax.runs.measuring.evaluated_samples import (
    WantedSamples,
    check_conditions,
    check_prompts,
    conditioning_images,
    label_shares,
    needs_test_images,
    own_mix,
    own_prompts,
    wanted_samples,
)
from diffjax.runs.measuring.kept_samples import KeptSamples, forget
from diffjax.runs.measuring.likelihoods import (
    WantedBits,
    check_levels,
    check_likelihood,
    measure_likelihood,
)
from diffjax.runs.measuring.results import file_of, keep_earlier
from diffjax.runs.parts import Parts
from diffjax.runs.samples.found_grids import FOUND
from diffjax.runs.samples.model import Request
from diffjax.runs.samples.recipes import Chosen, named_recipe
from diffjax.settings import NumSamples
from diffjax.spec import build, check_arguments, choose
from diffjax.training.averages import Averages
from diffjax.training.sharding import local_rows
from diffjax.training.state import LIVE
from diffjax.wiring import Wired, check_recipe

_NEIGHBOUR_ROWS = 10
_LIKELIHOOD_BATCH = 128  # with gradients, it takes more memory than sampling does


@dataclass(frozen=True)
class Wanted:
    """The samples to evaluate: all combinations of these lists; None keeps the run's setting.

    Attributes:
        solvers: names.
        grids: names; None is the run's own.
        num_steps: intervals of the grid.
        num_samples: the number of samples.
        labels: "data", in the proportions of the real images; "balanced"; or numbers or names of
            classes, comma-separated, in turn. A class that is called "data" is named by its number.
        prompts: `@FILE` with a text in each line, which samples show in turn, or one text; then
            labels have no influence. CLIP score and retrieval accuracy need texts.
        batch_size: samples at a time, and images of a likelihood; it changes no number but for
            rounding, only memory and time.
        guidance_scales: 1 is off.
        guidance: names of its parts, joined by "+".
        against: the source of its second prediction.
        seeds: seeds of the noise.
        weights: `live`, or names of averages.
        extractors: the networks whose features distances compare. All rows are by the first;
            numbers by the others, of the run's own recipe, are under `extractors`.

    Raises:
        UserError: one of another kind, or a number out of range.
    """

    solvers: Sequence[str] | None = None
    grids: Sequence[str] | None = None
    num_steps: Sequence[NumSteps] | None = None
    num_samples: NumSamples | None = None
    labels: str | None = None
    prompts: str | None = None
    batch_size: AtLeastOne[int] | None = None
    guidance_scales: Sequence[float] | None = None
    guidance: str | None = None
    against: str | None = None
    seeds: Sequence[int] | None = None
    weights: Sequence[str] | None = None
    extractors: Sequence[Extractor] | None = None

    def __post_init__(self) -> None:
        check_arguments(Wanted, **vars(self))


def measure(
    run: Run,
    dataset: DataSet,
    wanted: Wanted = Wanted(),
    *,
    should_stop: Callable[[], bool] = lambda: False,
    begun: Callable[[int], Any] = lambda batch: None,
    report: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Evaluates a run and writes `evaluation.json` and `samples/neighbours.png` into its folder.

    The evaluation of a step before the newest checkpoint is a file of its own (`file_of`).
    The run's own recipe is measured in full, with the first guidance scale, seed and weights that
    are wanted. Each training seed has noise of its own (`noise_seed`). Bits per dimension, by the
    methods in `config.evaluation.likelihood`, are added to `likelihood.json`.

    Args:
        run: the model.
        dataset: what it was trained on.
        wanted: the samples and the extractors.
        should_stop: called before each batch of samples; if it returns True, the evaluation ends.
        begun: called with the number of each batch before it is drawn, its features are computed
            or its likelihood is measured.
        report: called with each row of the table as it is done.

    Returns:
        The content of `evaluation.json`.

    Raises:
        UserError: an unknown solver, grid or average, images that the extractor can't take.
        Interrupted: `should_stop` returned True, or a signal came. Samples that were drawn are kept
            (`diffjax.runs.measuring.kept_samples`), and the same call goes on with them.
    """
    wired, settings = run.parts.wired, run.config.evaluation
    extractors = wanted.extractors or own_extractors(run.config, dataset)
    main, others = wanted_recipes(run, wanted)
    _check_recipes([main, *others], wired)  # The last as well, before the first is drawn.
    for recipe in (main, *others):
        run.model(recipe.weights)  # Refused before the real images are read.
    mix = wanted.labels or own_mix(run.config)
    label_shares(mix, wired, dataset)
    texts = own_prompts(run.config, wanted.prompts)
    if not texts and needs_test_images(wired):
        check_conditions(wired, dataset)
    numbers = count(1)

    def beat() -> None:
        begun(next(numbers))

    stopped = (
        f"stopped while evaluating; the training in {run.workdir} is finished and saved, the same "
        "command goes on with the evaluation"
    )

    def before_samples(_: int) -> None:
        if should_stop():
            raise Interrupted(stopped)
        beat()

    with stop_at_once(stopped):
        references = [_logged_reference(dataset, extractor, beat) for extractor in extractors]
        num_samples = wanted.num_samples or settings.num_samples
        shares = label_shares(mix, wired, dataset, references[0].class_counts)
        labels = proportional_labels(num_samples, shares)
        samples = wanted_samples(wired, lambda: dataset, labels, texts)
        recipes = distinct([main, *others])
        draw = drawer(run, recipes, samples, before_samples, wanted.batch_size)
        with progress("evaluating", sum(map(_cost, recipes))) as evaluating:
            result = evaluate(
                _logged_draw(draw, recipes, evaluating),
                recipes,
                references,
                labels=samples.labels if dataset.num_classes else None,
                texts=samples.texts,
                report=report,
            )
        summary = {"step": run.step, "weights": main.weights, **result.summary}
        summary["sampling"]["noise_seed"] = noise_seed(run.config.seed, main.seed)
        for method in settings.likelihood:
            at_once = wanted.batch_size or _LIKELIHOOD_BATCH
            bits = WantedBits(method, num_images=num_samples, batch_size=at_once)
            with progress(f"measuring bits per dimension by {method}"):
                found = measure_likelihood(run, dataset, bits, begun=lambda _: beat())
            if is_first():
                add_likelihood(run.workdir, found)
    if is_first():
        with translate_storage_errors(run.workdir):
            keep_earlier(run.workdir, run.step)
            write_json(path := file_of(run.workdir, workdirs.EVALUATION, run.step), summary)
            if path.name == workdirs.EVALUATION:
                save_neighbours(run.workdir, references[0].train_images, result.samples)
        forget(run.workdir)
    return summary


def _logged_reference(
    dataset: DataSet, extractor: Extractor, beat: Callable[[], None]
) -> metrics.Reference:
    """`reference_of` that logs how many images have been read."""
    total = sum(min(len(each), MAX_IMAGES) for each in (dataset.reference, dataset.test))
    with progress(f"reading the real images, features by {extractor.name}", total) as reading:
        done = count(1)

        def counted() -> None:
            beat()
            reading.at(min(next(done) * extractor.batch_size_images, total))

        return reference_of(dataset, extractor, counted)


def _logged_draw(draw: Draw, recipes: Sequence[NamedRecipe], evaluating: Progress) -> Draw:
    """`draw` that logs its progress over all recipes, which must be drawn in order."""
    numbers, costs = count(1), [0, *accumulate(map(_cost, recipes))]

    def logged(named: NamedRecipe) -> tuple[Batches, int]:
        number, n = next(numbers), len(recipes)
        before, cost = costs[number - 1], _cost(named)
        how = f"{named.solver}, {named.recipe.num_steps} steps"
        evaluating.at(before, f"evaluating {number} of {n}: {how}")
        drawn, nfe = draw(named)
        images = drawn if isinstance(drawn, Batches) else Batches.of(drawn)

        def counted() -> Iterator[np.ndarray]:
            done = 0
            for batch in images.batches:
                done += len(batch)
                evaluating.at(before + cost * done / images.num_images)
                yield batch

        return replace(images, batches=counted()), nfe

    return logged


def _cost(named: NamedRecipe) -> int:
    """Network evaluations per sample; for adaptive solvers, an estimate by the number of steps."""
    return named.recipe.nfe or named.recipe.num_steps * named.recipe.calls


def wanted_recipes(run: Run, wanted: Wanted) -> tuple[NamedRecipe, list[NamedRecipe]]:
    """The run's own recipe, and all other wanted recipes; some may occur twice.

    Raises:
        UserError: an unknown solver, grid or guidance, or an empty list of what there must be.
    """
    settings, how = run.config.evaluation, (wanted.guidance, wanted.against)
    for name in ("guidance_scales", "seeds", "weights"):
        if getattr(wanted, name) is not None and not len(getattr(wanted, name)):
            raise UserError(f"{name} is empty; leave it out for that of the run's config")
    main = replace(
        named_recipe(run, Chosen(None, None, None, _first(wanted.guidance_scales), *how)),
        weights=_first(wanted.weights) or run.config.weights,
        seed=settings.seed if wanted.seeds is None else wanted.seeds[0],
    )

    def listed(name: str) -> Sequence[Any]:
        given = getattr(wanted, name)
        return (settings[name] if given is None else given) or (None,)

    solvers, steps = (
        settings[name] if getattr(wanted, name) is None else getattr(wanted, name)
        for name in ("solvers", "num_steps")
    )
    # Where there are no steps, these are not looked up by name below.
    for name in solvers:
        choose(choices.SOLVERS, name, "solver")
    for name in listed("grids"):
        if name not in (None, FOUND):
            choose(choices.GRIDS, name, "grid")
    # What an arm is judged by has its choices too: the run's own solver and steps come first.
    drawn = [(None, None, None), *product(solvers, listed("grids"), steps)]
    crossed = product(drawn, listed("guidance_scales"), listed("weights"), listed("seeds"))
    others = [
        replace(
            named_recipe(run, Chosen(solver, grid, num_steps, scale, *how)),
            weights=name or main.weights,
            seed=main.seed if seed is None else seed,
        )
        for (solver, grid, num_steps), scale, name, seed in crossed
    ]
    return main, others


def drawer(
    run: Run,
    recipes: Sequence[NamedRecipe],
    samples: "WantedSamples",
    begun: Callable[[int], Any] = lambda number: None,
    batch_size: int | None = None,
) -> Draw:
    """Returns a function that draws the samples of a recipe, and counts its evaluations.

    Args:
        run: the model.
        recipes: whose weights are wanted.
        samples: their conditions and sources.
        begun: called before each batch; what it raises ends the drawing.
        batch_size: samples at a time, `config.evaluation.batch_size` by default; fewer where fewer
            are drawn.

    Raises:
        UserError: the run keeps no such weights.
    """
    most = batch_size or run.config.evaluation.batch_size
    models = {recipe.weights: run.model(recipe.weights) for recipe in recipes}
    for each in recipes:
        models[each.weights].weaker(each.recipe)  # Refused before the first is drawn.

    def draw(named: NamedRecipe) -> tuple[Batches, int]:
        model = models[named.weights]
        seed = noise_seed(run.config.seed, named.seed)
        request = Request(samples.condition, seed, samples.source)
        at_once = min(most, len(request))
        kept = KeptSamples(run, model, named)
        images = model.batches(named.recipe, request, at_once, begun, kept)
        nfe = model.nfe(named.recipe, next(request.batches(at_once)))
        return Batches(len(request), images, lambda: sum(kept.seconds)), nfe

    return draw


def noise_seed(training_seed: int, seed: int) -> int:
    """The seed of the noise for an evaluation with `seed`: `seed + 1000·training_seed`, modulo 2³².

    Runs of one training seed start from the same noise, those of different training seeds from
    different noise. With one noise for all runs, the effect of that noise on the difference of two
    arms would be the same for all training seeds, and no number of them would show that it is
    chance.

    Example:
        >>> noise_seed(0, 3), noise_seed(2, 3)
        (3, 2003)
    """
    return (seed + 1000 * training_seed) % 2**32


def add_likelihood(workdir: Path, result: Mapping[str, Any]) -> None:
    """Adds what `measure_likelihood` found to `likelihood.json`, by method and dequantisation."""
    path = file_of(workdir, LIKELIHOOD, result["step"])
    name = f"{result['method']}-{result['dequantisation']}"
    write_json(path, (read_json(path) or {}) | {name: result})


def reference_of(
    dataset: DataSet, extractor: Extractor, beat: Callable[[], None]
) -> metrics.Reference:
    """The real images that a run's samples are compared with; `beat` is called at each batch."""
    return metrics.reference(
        dataset,
        with_beat(beat, extractor.of(dataset)),
        folder=cached_arrays.FOLDER,
        sharding=local_rows(),
        shared=jax.process_count() > 1,
    )


def with_beat(beat: Callable[[], None], extractor: Extractor) -> Extractor:
    """An extractor that calls `beat` before each batch, since a reference may take hours."""

    def prepare(images: np.ndarray) -> np.ndarray:
        beat()
        return extractor.prepare(images)

    return replace(extractor, prepare=prepare)


def own_extractors(config: ConfigDict, dataset: DataSet) -> tuple[Extractor, ...]:
    """The extractors whose features a config's distances compare, the main one first.

    Raises:
        UserError: one of them can't be loaded.
    """
    further = (
        build(part, Extractor, f"config.evaluation.extractors[{i}]").of(dataset)
        for i, part in enumerate(config.evaluation.extractors)
    )
    return own_extractor(config, dataset), *further


def own_extractor(config: ConfigDict, dataset: DataSet) -> Extractor:
    """The extractor whose features a config's metrics compare, the main one of `own_extractors`.

    Raises:
        UserError: it can't be loaded.
    """
    extractor = build(config.evaluation.extractor, Extractor, "config.evaluation.extractor")
    return extractor.of(dataset)


def check_evaluation(parts: Parts, dataset: DataSet) -> None:
    """Refuses an evaluation that could not run, before the first training step.

    Raises:
        UserError: an unknown solver, grid or label, a recipe that does not suit the model, an
            extractor for other images, too few images, bits per dimension of what has none.
    """
    config, settings = parts.config, parts.config.evaluation
    for name in settings.grids:  # None has been found for this run yet.
        choose(choices.GRIDS, name, "grid")
    kept = [LIVE, *Averages.of(config).names]
    for name in settings.weights:
        if name not in kept:
            raise UserError(f"config.evaluation.weights: no {name!r}; {nearest(name, kept)}")
    main, others = wanted_recipes(Run(parts, parts.abstract, Path()), Wanted())
    _check_recipes([main, *others], parts.wired)
    label_shares(own_mix(config), parts.wired, dataset)
    if prompts := own_prompts(config):
        check_prompts(parts.wired, prompts)
    _check_counts(parts, dataset)
    for extractor in own_extractors(config, dataset):
        _check_extractor(extractor, dataset.picture_shape)
    for method in settings.likelihood:
        check_levels(dataset)
        check_likelihood(parts.wired.objective, method)
    _ = parts.codec.params  # Read, or refused.


def _check_recipes(recipes: Sequence[NamedRecipe], wired: Wired) -> None:
    """Refuses all recipes where one does not suit the model."""
    for named in recipes:
        try:
            check_recipe(named.recipe, wired)
        except UserError as error:
            raise UserError(f"{named.solver} on {named.grid}: {error}") from None


def _check_extractor(extractor: Extractor, image_shape: tuple[int, int, int]) -> None:
    """Evaluates an extractor abstractly on one image, to check that it takes such images."""
    one_image = np.zeros((1, *image_shape), np.float32)
    check_images(one_image, extractor.image_shape, f"extractor {extractor.name}")
    jax.eval_shape(extractor.apply, extractor.prepare(one_image))


def _check_counts(parts: Parts, dataset: DataSet) -> None:
    """Refuses data with too few real images for the distances of the evaluation."""
    num_real, num_test = len(dataset.reference), len(dataset.test)
    if num_real < FEWEST_IMAGES:
        raise UserError(
            f"{dataset.name} has {num_real} images that samples could be compared with, and "
            f"distances need {FEWEST_IMAGES}: add some"
        )
    given = len(conditioning_images(parts.wired, dataset))
    of_test_images = needs_test_images(parts.wired) and not parts.config.evaluation.prompts
    if of_test_images and given < FEWEST_IMAGES:
        raise UserError(
            f"samples of this run have the sources or conditions of test images, and "
            f"{dataset.name} has {num_test}: its evaluation needs {FEWEST_IMAGES}"
        )
    if parts.config.evaluation.likelihood and not num_test:
        raise UserError(
            f"config.evaluation.likelihood is that of test images, and {dataset.name} has none"
        )


def _first(given: Sequence[Any] | None) -> Any:
    return None if given is None else given[0]


def save_neighbours(workdir: Path, train_images: ImageSet, samples: np.ndarray) -> None:
    """Writes `samples/neighbours.png`; a row has a sample, and its nearest training images."""
    samples = samples[:_NEIGHBOUR_ROWS]
    k = min(5, len(train_images))
    indices, _ = neighbours.nearest_neighbours(samples, train_images, k=k)
    near = train_images.take(indices.ravel()).reshape(*indices.shape, *samples.shape[1:])
    rows = np.concatenate([samples[:, None], near], axis=1)
    path = workdir / "samples" / "neighbours.png"
    save_png(path, rows.reshape(-1, *samples.shape[1:]), columns=k + 1)
