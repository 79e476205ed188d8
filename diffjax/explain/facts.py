"""Computes the numbers and pictures of the page that explains a run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffjax.codecs import Identity
from diffjax.conditions import Classes, Condition
from diffjax.data import DataSet
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import Extractor
from diffjax.explain.dial import EACH, Dial, dial
from diffjax.explain.examples import Examples, distance, variety
from diffjax.explain.lesson import Lesson, lesson
from diffjax.explain.levels import NUM_LEVELS, Levels, at_levels, level_of, times_of_levels
from diffjax.explain.network_parts import Part, network_parts
from diffjax.explain.way_back import WayBack, way_back
from diffjax.host.progress import progress
from diffjax.process.precond import Meaning
from diffjax.runs.load import Run, load
from diffjax.runs.measuring.evaluated_samples import conditions_to_show
from diffjax.runs.measuring.measure import own_extractor
from diffjax.runs.samples.model import Model
from diffjax.runs.workdirs import checkpoint_steps
from diffjax.wiring import check_recipe

_SHOWN_PIXELS = 4_096
_MOST_CONDITIONS = 10


@dataclass(frozen=True)
class Means:
    """The pictures of one step beside the means of training pictures.

    Attributes:
        nearest: `[B, H, W, C]`, the nearest class mean of each picture.
        titles: the classes of these means; None for a model without classes.
        to_mean: the mean distance of the pictures to these means.
        of_examples: the mean distance of the training pictures to the mean of their class.
        examples: `[n, H, W, C]`, some of the training pictures in the first mean.
        num_examples: the number of pictures that the means are computed from.
    """

    nearest: np.ndarray
    titles: list[str] | None
    to_mean: float
    of_examples: float
    examples: np.ndarray
    num_examples: int


@dataclass(frozen=True)
class Latents:
    """Latents, and the pictures that the codec decodes them to.

    Attributes:
        codec: the description of the codec.
        values: the latents, `[n, h, w, c]`.
        pictures: the decoded pictures, `[n, H, W, C]`.
    """

    codec: str
    values: np.ndarray
    pictures: np.ndarray


@dataclass(frozen=True)
class Facts:
    """A run as its page shows it; pictures are decoded, in [-1, 1].

    Attributes:
        run: the run at the checkpoint whose weights are shown.
        name: the name of the data.
        num_train: the number of training pictures.
        picture_shape: `(H, W, C)`.
        meaning: what the network predicts.
        titles: the titles of the shown training pictures and samples; None without.
        kind: a description of the condition; "" without one.
        clean: `[n, H, W, C]`, training pictures.
        levels: the same pictures at several noise levels, with predictions.
        lesson: one training step.
        lesson_levels: the noise levels of its pictures.
        lesson_titles: the titles of its pictures; None without, "" where the condition was dropped.
        way: samples in many steps and in one.
        way_titles: the titles of the samples.
        to_training: `[n]`, the distance of each of the samples to the nearest training picture.
        means: why one step blurs.
        dial: guidance; None where it does not apply.
        dial_titles: the titles of its conditions.
        real_variety: the variety of training pictures of one class; None without classes.
        no_dial: the reason why guidance is not shown; "" if it is.
        parts: the parts of the network.
        latents: None for a model of pictures.
    """

    run: Run
    name: str
    num_train: int
    picture_shape: tuple[int, int, int]
    meaning: Meaning
    titles: list[str] | None
    kind: str
    clean: np.ndarray
    levels: Levels
    lesson: Lesson
    lesson_levels: np.ndarray
    lesson_titles: list[str] | None
    way: WayBack
    way_titles: list[str] | None
    to_training: np.ndarray
    means: Means
    dial: Dial | None
    dial_titles: list[str] | None
    real_variety: float | None
    no_dial: str
    parts: list[Part]
    latents: Latents | None


def gather(
    run: Run, dataset: DataSet, *, lesson_of: Run | None = None, num_steps: int = NUM_LEVELS
) -> Facts:
    """Computes all that the page of a run shows.

    Args:
        run: the run whose weights are shown.
        dataset: the data that it is trained on.
        lesson_of: the run at the checkpoint whose next training step is shown; by default `run`.
        num_steps: the number of steps of the long way back.

    Raises:
        UserError: a run that does not start from noise.
    """
    model, wired = run.model(), run.parts.wired
    if wired.objective.traits.starts_at_source:
        raise UserError(
            f"{run.workdir} makes images from images, and the page explains models that start from "
            "noise: use experiments.report"
        )
    with progress("reading training pictures") as working:
        examples, kind = Examples.of(run, dataset), wired.condition
        n, decoded = pictures_shown(dataset.picture_shape), _decoder(model)
        rows = examples.shown(n)
        cond = jax.tree.map(lambda leaf: np.asarray(leaf)[rows], examples.condition)
        clean = examples.images[rows]
        working.at(1, "guessing pictures at noise levels")
        levels = at_levels(model, run.recipe.grid, clean, cond)
        working.at(2, "taking one training step")
        taught = lesson(lesson_of or run, dataset)
        working.at(3, f"walking back in {num_steps:,} steps")
        shown, _ = conditions_to_show(wired, lambda: dataset, n)
        way = way_back(model, run.recipe, shown, num_steps, seed=0)
        working.at(4, "drawing samples at guidance scales")
        guided, why = _dial(run, model, dataset)
    return Facts(
        run=run,
        name=dataset.name,
        num_train=len(dataset.train),
        picture_shape=dataset.picture_shape,
        meaning=wired.objective.traits.meaning,
        titles=_titles(kind, cond),
        kind=kind.describe() if kind.can_be_dropped else "",
        clean=decoded(clean),
        levels=levels._replace(
            noisy=decoded(_dimmed(levels.noisy, levels.a, levels.s)), guess=decoded(levels.guess)
        ),
        lesson=_decoded_lesson(taught, n, wired.path, decoded),
        lesson_levels=level_of(taught.t[:n], times_of_levels(run.recipe.grid, wired.path)),
        lesson_titles=_titles(kind, jax.tree.map(lambda leaf: leaf[:n], taught.condition)),
        way=way._replace(
            x=decoded(_dimmed(way.x, *_scales(wired.path, way.t))),
            x0=decoded(way.x0),
            in_one=decoded(way.in_one),
        ),
        way_titles=_titles(kind, shown),
        to_training=_to_training(way.x0[-1], examples),
        means=_means(model, examples, way.in_one, kind),
        dial=None if guided is None else guided[0],
        dial_titles=None if guided is None else guided[1],
        real_variety=_real_variety(examples, decoded),
        no_dial=why,
        parts=network_parts(wired),
        latents=_latents(model, clean),
    )


def gathered(
    workdir: str | Path,
    *,
    weights: str | None = None,
    data_path: str | None = None,
    num_steps: int = NUM_LEVELS,
    allowed_packages: tuple[str, ...] = ("diffjax",),
) -> Facts:
    """The facts of a run's folder, with the training step that follows its first checkpoint.

    A checkpoint of step 0 is passed over, since its network has learned nothing.

    Raises:
        UserError: no trained run there, its data are missing, or as `gather`.
    """
    run = load(workdir, weights=weights, allowed_packages=allowed_packages)
    dataset = run.dataset(data_path)
    steps = [step for step in checkpoint_steps(run.workdir) if 0 < step < run.step]
    earlier = None
    if steps:
        earlier = load(run.workdir, step=min(steps), allowed_packages=allowed_packages)
    return gather(run, dataset, lesson_of=earlier, num_steps=num_steps)


def pictures_shown(picture_shape: tuple[int, int, int]) -> int:
    """How many pictures are in a row of the page: fewer of larger ones.

    Example:
        >>> [pictures_shown((side, side, 3)) for side in (8, 28, 32, 64, 256)]
        [6, 5, 4, 3, 3]
    """
    return int(np.clip(_SHOWN_PIXELS // (picture_shape[0] * picture_shape[1]), 3, 6))


def _decoder(model: Model) -> Callable[[np.ndarray], np.ndarray]:
    """`[…, h, w, c]` latents to pictures `[…, H, W, C]` in [-1, 1]."""

    def decoded(latents: np.ndarray) -> np.ndarray:
        flat = np.asarray(latents, np.float32).reshape(-1, *latents.shape[-3:])
        images = np.clip(np.nan_to_num(model.decoded(flat)), -1.0, 1.0)
        return images.reshape(*latents.shape[:-3], *images.shape[1:])

    return decoded


def _titles(kind: Condition, cond: Any) -> list[str] | None:
    """A text for each example: its name, or the number of its class; "" where it is dropped.

    Example:
        >>> [_titles(kind, np.array([1, 2])) for kind in (Classes(2, ("cat", "dog")), Classes(2))]
        [['dog', ''], ['1', '']]
    """
    titles = kind.titles(cond)
    if titles is not None or not isinstance(kind, Classes):
        return titles
    return ["" if label == kind.num_classes else str(label) for label in np.asarray(cond)]


def _scales(path: Any, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(path.alpha(np.float32(t))), np.asarray(path.sigma(np.float32(t)))


def _dimmed(x: np.ndarray, a: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Noisy pictures whose noise is larger than a picture's range, scaled to it."""
    size = np.maximum(1.0, np.hypot(a, s))
    return x / size.reshape(-1, *[1] * (x.ndim - 1))


def _decoded_lesson(taught: Lesson, n: int, path: Any, decoded: Any) -> Lesson:
    """The first n pictures of a step, decoded."""
    t = taught.t[:n]
    return taught._replace(
        clean=decoded(taught.clean[:n]),
        noisy=decoded(_dimmed(taught.noisy[:n], *_scales(path, t))),
        guess=decoded(taught.guess[:n]),
        t=t,
        answer=taught.answer[:n],
    )


def _means(model: Model, examples: Examples, in_one: np.ndarray, kind: Any) -> Means:
    means = examples.means
    labels = np.array(sorted(means))
    stacked = np.stack([means[label] for label in labels])
    between = [[distance(x, mean) for mean in stacked] for x in in_one]
    nearest = np.argmin(between, axis=1)
    own = np.zeros(len(examples.images), int) if examples.labels is None else examples.labels
    spread = [distance(x, means[int(c)]) for x, c in zip(examples.images, own, strict=True)]
    decoded = _decoder(model)
    some = examples.images[own == labels[nearest[0]]][: len(in_one)]
    return Means(
        nearest=decoded(stacked[nearest]),
        titles=None if examples.labels is None else _titles(kind, labels[nearest]),
        to_mean=float(np.min(between, axis=1).mean()),
        of_examples=float(np.mean(spread)),
        examples=decoded(some),
        num_examples=len(examples.images),
    )


def _to_training(samples: np.ndarray, examples: Examples) -> np.ndarray:
    """The distance of each sample to the nearest training picture, `[B]`."""
    return np.array([min(distance(x, image) for image in examples.images) for x in samples])


def _real_variety(examples: Examples, decoded: Any) -> float | None:
    """The variety of up to `EACH` training pictures of each class, of classes with that many."""
    if examples.labels is None:
        return None
    groups = [
        examples.images[examples.labels == label][:EACH]
        for label in np.unique(examples.labels)[:_MOST_CONDITIONS]
    ]
    whole = [group for group in groups if len(group) == EACH]
    return variety(decoded(np.stack(whole))) if whole else None


def _dial(
    run: Run, model: Model, dataset: DataSet
) -> tuple[tuple[Dial, list[str] | None] | None, str]:
    """The dial with the titles of its conditions, or None and the reason."""
    wired, kind = run.parts.wired, run.parts.wired.condition
    number = min(_MOST_CONDITIONS, kind.num_classes if isinstance(kind, Classes) else 4)
    try:
        check_recipe(replace(run.recipe, guidance_scale=2.0), wired)
        shown, _ = conditions_to_show(wired, lambda: dataset, number)
        labels = np.asarray(shown) if isinstance(kind, Classes) else None
        extractor = None if labels is None else _classifier(run, dataset)
        found = dial(model, run.recipe, shown, labels=labels, extractor=extractor)
    except UserError as error:
        return None, str(error)
    return (found, _titles(kind, shown)), ""


def _classifier(run: Run, dataset: DataSet) -> Extractor | None:
    """The extractor of the run, if it classifies its pictures."""
    try:
        extractor = own_extractor(run.config, dataset)
    except UserError:
        return None  # Its weights are not here.
    fits = extractor.image_shape in (None, dataset.picture_shape)
    return extractor if fits and extractor.test_accuracy is not None else None


def _latents(model: Model, clean: np.ndarray) -> Latents | None:
    codec = model.codec
    if isinstance(codec, Identity):
        return None
    shape = model.wired.image_shape
    return Latents(codec.describe(shape), clean, _decoder(model)(clean))
