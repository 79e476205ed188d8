"""Checks before step 1: of a config by itself, and of the data with its parts."""

from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from diffjax.data import Augment, DataSet
from diffjax.errors import UserError, nearest
from diffjax.runs.parts import Parts
from diffjax.settings import check_complete, check_names, check_settings
from diffjax.spec import build
from diffjax.training.averages import Averages
from diffjax.training.state import LIVE


def check_config(config: ConfigDict) -> None:
    """Refuses settings that are unknown, missing or out of their range; nothing is built.

    Raises:
        UserError: the first of them.
    """
    check_complete(config)
    check_settings(config)
    check_names(config)
    kept = [LIVE, *Averages.of(config).names]
    if config.weights not in kept:
        suggestion = nearest(config.weights, kept)
        raise UserError(f"config.weights={config.weights!r} are not kept by the run; {suggestion}")


def check_expected(config: ConfigDict, dataset: DataSet) -> None:
    """Refuses data that differ from `config.expected`, for which a config was written and planned.

    Args:
        config: resolved; its `expected` may have `image_shape`, `num_classes` and `num_images`, for
            training or in all.
        dataset: that of the config.

    Raises:
        UserError: the first that differs.
    """
    expected: Mapping[str, Any] = config.get("expected", {})
    num_train, in_all = len(dataset.train), len(dataset.train) + len(dataset.test)
    found = {"image_shape": dataset.image_shape, **dataset.condition.network_arguments()}
    if expected.get("num_images") != in_all:
        found["num_images"] = num_train
    for name, value in found.items():
        wanted = expected.get(name, value)
        if tuple_or_number(wanted) != tuple_or_number(value):
            raise UserError(
                f"the data have {name}={value}, and this config is for {wanted}: take its data, "
                f"or set --config.expected.{name}"
            )


def tuple_or_number(value: Any) -> Any:
    """A list, as JSON has it, as a tuple.

    Example:
        >>> tuple_or_number([8, 8, 1]), tuple_or_number(3)
        ((8, 8, 1), 3)
    """
    return tuple(value) if isinstance(value, list | tuple) else value


def check_pairs(parts: Parts, dataset: DataSet) -> None:
    """Refuses a data set without the sources or conditions that training needs.

    Raises:
        UserError: training needs one for each image, or sampling starts from one.
    """
    objective, condition = parts.wired.objective, parts.wired.condition
    if dataset.given is not None and len(dataset.train):
        there = dataset.train.gather([0])
        missing = [name for name in condition.shapes(1) if name not in there]
        if missing:
            raise UserError(
                f"{dataset.name} has the condition {condition.describe()}, and its "
                f"batches have no {', '.join(missing)}: add them with GivenSource (docs/data.md)"
            )
    if objective.traits.features is not None and len(dataset.train):
        _check_features(parts.config, objective.traits.features, dataset)
    for needed, source, part in (
        (objective.traits.needs_source, dataset.train, "training"),
        (objective.traits.starts_at_source, dataset.test, "test"),
    ):
        if needed and len(source) and "source" not in source.gather([0]):
            raise UserError(
                f"this objective needs a source for each {part} image, and {dataset.name} has "
                "none: take a data set of pairs (docs/bridges.md), or another objective"
            )


def check_buckets(parts: Parts, dataset: DataSet) -> None:
    """Refuses a network with other parameters for the images of a bucket than for squares.

    Latents are those of published networks, whose parameters depend on no size.

    Raises:
        UserError: it has such, or can't take images of that shape.
    """
    wired, key = parts.wired, jax.eval_shape(lambda: jax.random.key(0))
    shapes = dict.fromkeys(bucket.image_shape for bucket in dataset.train.buckets)
    for shape in shapes if dataset.train.pixels else ():
        height, width, _ = shape
        what = f"images of {height}x{width}, a bucket of {dataset.name}"
        try:
            there = jax.eval_shape(wired._replace(image_shape=shape).init, key)
        except UserError as error:
            raise UserError(f"{what}: {error}; or set data.buckets=0") from None
        if _shapes(there) != _shapes(wired.params_shape):
            raise UserError(
                f"{type(wired.network).__name__} has other parameters for {what}: a U-Net needs "
                "model.attention_resolutions=() and a DiT model.positions=fixed, or set "
                "data.buckets=0"
            )


def _shapes(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.shape, params)


def _check_features(config: ConfigDict, wanted: tuple[int, ...], dataset: DataSet) -> None:
    """Refuses data without the features that the objective aligns with, and changed images.

    Raises:
        UserError: there are none, they have another shape, or images are augmented.
    """
    there: Any = dataset.train.gather([0])
    shape = "x".join(map(str, wanted))
    if "features" not in there:
        raise UserError(
            f"this objective aligns with features of {shape}, and {dataset.name} has none: store "
            "them by experiments.encode_latents --features, or see featured in docs/objectives.md"
        )
    found = there["features"].shape[1:]
    if found != wanted:
        raise UserError(
            f"this objective aligns with features of {shape}, and those of {dataset.name} are "
            f"{'x'.join(map(str, found))}: set the features of the wrapper to these"
        )
    if dataset.train.pixels and build(config.augment) != Augment():
        raise UserError(
            "features are of the images as they are, and config.augment changes them: set "
            "flip_probability=0 and max_shift_pixels=0"
        )
