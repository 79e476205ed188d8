"""Samples at several guidance scales: what guidance gains, and its price in variety."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.conditions.base import len_of
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import Extractor
from diffjax.explain.examples import variety
from diffjax.runs.samples.model import Model, Request
from diffjax.sampling.sample import Recipe
from diffjax.wiring import check_recipe

SCALES = (0.0, 1.0, 2.0, 4.0, 7.0, 10.0)
EACH = 10
"""Samples of each condition, at each scale."""


class Dial(NamedTuple):
    """Samples at S scales, `EACH` of each of k conditions, from the same noise at all scales.

    Attributes:
        scales: `[S]`.
        pictures: `[S, k, EACH, H, W, C]`, decoded, in [-1, 1].
        variety: `[S]`, the mean distance of two pictures of one condition.
        accuracy: `[S]`, the share that an independent classifier recognises; None without one.
        nfe: network evaluations per picture, with guidance; None where the solver chooses.
    """

    scales: tuple[float, ...]
    pictures: np.ndarray
    variety: tuple[float, ...]
    accuracy: tuple[float, ...] | None
    nfe: int | None


def dial(
    model: Model,
    recipe: Recipe,
    condition: Any,
    *,
    labels: np.ndarray | None = None,
    extractor: Extractor | None = None,
    seed: int = 0,
) -> Dial:
    """Draws samples at the scales in `SCALES` and at the run's own.

    Args:
        model: the network.
        recipe: the recipe of the run.
        condition: k rows.
        labels: `[k]`, their classes, for the accuracy.
        extractor: with logits for these classes; None for no accuracy.
        seed: the seed of the noise.

    Raises:
        UserError: the model can't be sampled with guidance.
    """
    check_recipe(replace(recipe, guidance_scale=SCALES[-1]), model.wired)
    k = len_of(condition)
    repeated = jax.tree.map(lambda rows: np.repeat(np.asarray(rows), EACH, axis=0), condition)
    request = Request(repeated, seed)
    scales = tuple(sorted({*SCALES, float(recipe.guidance_scale)}))
    drawn = [
        np.clip(model.sample(replace(recipe, guidance_scale=scale), request), -1.0, 1.0)
        for scale in scales
    ]
    if not np.isfinite(drawn).all():
        raise UserError("samples at some guidance scale are not finite")
    accuracy = None
    if extractor is not None and labels is not None:
        right = np.repeat(labels, EACH)
        accuracy = tuple(share_recognised(extractor, images, right) for images in drawn)
    grouped = [images.reshape(k, EACH, *images.shape[1:]) for images in drawn]
    guided = replace(recipe, guidance_scale=SCALES[-1])
    return Dial(scales, np.stack(grouped), tuple(map(variety, grouped)), accuracy, guided.nfe)


def share_recognised(extractor: Extractor, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images whose largest logit is that of their label."""
    _, logits = extractor.by(len(images)).extract(images)
    assert logits is not None
    return float(np.mean(logits.argmax(axis=1) == labels))
