"""The samples that a run is evaluated by: their labels, prompts or conditions of test images."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from diffjax.data import DataSet, Source, all_captions, all_examples
from diffjax.errors import UserError
from diffjax.evaluation.reference import class_counts
from diffjax.evaluation.scores.label_mix import proportional_labels
from diffjax.host.files import place_of
from diffjax.runs.load import Run
from diffjax.runs.samples.condition_files import texts_in
from diffjax.wiring import Wired


def own_mix(config: ConfigDict) -> str:
    """The label mix of a config."""
    return config.evaluation.labels


def labels_in_mix(
    run: Run, n: int, mix: str | None = None, data_path: str | None = None
) -> np.ndarray:
    """Labels in the proportions in which an evaluation of a run draws them, int32 `[n]`.

    Args:
        run: the model.
        n: the number of labels.
        mix: as in `Wanted.labels`; `config.evaluation.labels` by default.
        data_path: where the data lie now, if they have moved.

    Raises:
        UserError: no such label, or data that are not there.
    """
    mix, wired = mix or own_mix(run.config), run.parts.wired
    if not wired.condition.can_be_dropped and mix in ("data", "balanced"):
        return np.zeros(n, np.int32)
    dataset = run.dataset(data_path)
    return proportional_labels(n, label_shares(mix, wired, dataset, class_counts(dataset)))


def label_shares(
    mix: str, wired: Wired, dataset: DataSet, class_counts: np.ndarray | None = None
) -> np.ndarray:
    """The relative frequency with which each class is drawn, `[K]`.

    Args:
        mix: as in `Wanted.labels`.
        wired: the model.
        dataset: whose classes they are.
        class_counts: the class counts of the real images; None if the call only checks that the mix
            exists.

    Raises:
        UserError: no such label, or a model whose samples have the labels of what they are made of.
    """
    classes = max(dataset.num_classes, 1)
    balanced = np.ones(classes, int)
    known = {"data": balanced if class_counts is None else class_counts, "balanced": balanced}
    if needs_test_images(wired) and mix != "data":
        raise UserError(
            f"evaluation.labels={mix}: the samples of this run have the conditions of test images, "
            "so leave it at data"
        )
    if mix in known:
        return known[mix]
    try:
        labels = wired.condition.parse(mix.split(","))
    except UserError as error:
        raise UserError(
            f"evaluation.labels={mix} is neither data nor balanced, and {error}"
        ) from None
    return np.bincount(labels, minlength=classes)


class WantedSamples(NamedTuple):
    """Labels, condition and sources of the n samples that a run is evaluated by.

    Attributes:
        labels: `[n]`, the class that each is to show; zeros without classes, None of prompts.
        condition: their condition, n rows.
        source: `[n, h, w, c]`, what each is made from; None where that is noise.
        texts: n of them, what each is to show; None where there are none.
    """

    labels: np.ndarray | None
    condition: Any
    source: np.ndarray | None
    texts: list[str] | None = None


def wanted_samples(
    wired: Wired,
    dataset: Callable[[], DataSet],
    labels: np.ndarray,
    prompts: Sequence[str] = (),
) -> WantedSamples:
    """The condition and sources of the samples that a run is evaluated by, one for each label.

    Samples that start from noise and are conditioned on classes have the given labels. If they
    start at a source, or a label does not determine their condition, sources and conditions are
    those of as many test images, evenly spaced, each of them at most once. Data without test images
    have the conditions of the reference images.

    Args:
        wired: the model.
        dataset: returns the data; called where test images are needed.
        labels: `[n]`.
        prompts: texts that samples show in turn, in the place of labels and test images; none by
            default.

    Raises:
        UserError: the condition can't be read from the prompts.
    """
    if prompts:
        check_prompts(wired, prompts)
        # A prompt is encoded once, also where there are more prompts than samples.
        rows = np.arange(len(labels)) % len(prompts)
        condition = wired.condition.parse(list(prompts[: len(labels)]))
        texts = [prompts[int(row)] for row in rows]
        return WantedSamples(None, wired.condition.take(condition, rows), None, texts)
    if not needs_test_images(wired):
        return WantedSamples(labels, wired.condition.of_labels(labels), None)
    given = conditioning_images(wired, dataset())
    batch = all_examples(given, len(labels))
    captions = all_captions(given, len(labels))
    source = batch.get("source") if wired.objective.traits.starts_at_source else None
    condition = wired.condition.of_batch(batch)
    return WantedSamples(batch["label"], condition, source, captions or None)


def own_prompts(config: ConfigDict, given: str | None = None) -> list[str]:
    """The text, or those in `@FILE`, of `config.evaluation.prompts` or `given`; [] if it is empty.

    Raises:
        UserError: the file can't be read, or has no `@` before it.
    """
    name = config.evaluation.prompts if given is None else given
    if name.startswith("@"):
        return texts_in(place_of(name[1:]))
    if name and place_of(name).is_file():
        raise UserError(f"evaluation.prompts={name} is a file: put @ before it, as in @{name}")
    return [name] if name else []


def check_prompts(wired: Wired, prompts: Sequence[str]) -> None:
    """Refuses prompts that no sample can show.

    Raises:
        UserError: samples start at images, or the condition can't be read from the first text.
    """
    if wired.objective.traits.starts_at_source:
        raise UserError(
            "evaluation.prompts: this run makes images from test images, which have conditions of "
            "their own: leave it empty"
        )
    try:
        wired.condition.parse(list(prompts[:1]))
    except UserError as error:
        raise UserError(f"evaluation.prompts: {error}") from None


def conditioning_images(wired: Wired, dataset: DataSet) -> Source:
    """The images whose sources or conditions samples have."""
    from_noise = not wired.objective.traits.starts_at_source
    return dataset.reference if from_noise and not len(dataset.test) else dataset.test


def check_conditions(wired: Wired, dataset: DataSet) -> None:
    """Refuses images without the conditions that samples would have.

    Raises:
        UserError: an array of a condition is missing.
    """
    given = conditioning_images(wired, dataset)
    names = given.gather(np.arange(min(1, len(given))))
    for name in wired.condition.shapes(1):
        if len(given) and name not in names:
            raise UserError(
                f"{dataset.name} has no {name}, the condition of this model "
                f"({wired.condition.describe()}): set evaluation.prompts, or --prompts"
            )


def needs_test_images(wired: Wired) -> bool:
    """Whether samples have the sources or conditions of test images.

    They do if samples start at a source, or if a label does not determine their condition.
    """
    if wired.objective.traits.starts_at_source:
        return True
    return wired.condition.of_labels(np.zeros(1, np.int32)) is None


def conditions_to_show(
    wired: Wired, dataset: Callable[[], DataSet], n: int, most: int | None = None
) -> tuple[Any, np.ndarray | None]:
    """The condition and the sources of samples for a picture.

    They cycle through all conditions if these can be listed, else they are those of test images.

    Args:
        wired: the model.
        dataset: returns the data; called where test images are needed.
        n: the number of samples; fewer if there are fewer test images.
        most: the largest number of different conditions.
    """
    listed = wired.condition.in_turn(n, most)
    if listed is not None and not wired.objective.traits.starts_at_source:
        return listed, None
    samples = wanted_samples(wired, dataset, np.zeros(n, np.int32))
    return samples.condition, samples.source
