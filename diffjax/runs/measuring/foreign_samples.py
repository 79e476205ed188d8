"""Evaluates samples that another code has drawn, by the metrics of a run's evaluation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.data import DataSet
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import Extractor
from diffjax.evaluation.metrics import compare_each
from diffjax.evaluation.sample_files import read_samples
from diffjax.evaluation.scores.distances import FEWEST_IMAGES
from diffjax.host.files import write_json
from diffjax.host.storage import make_writable
from diffjax.runs import workdirs
from diffjax.runs.measuring.measure import reference_of, save_neighbours


def measure_samples(
    path: str | Path,
    dataset: DataSet,
    extractors: Sequence[Extractor],
    folder: str | Path,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Evaluates samples in files, and writes `evaluation.json` and pictures to a folder.

        measure_samples("their_samples.npz", digits(), [classifier_features("digits")], "runs/them")

    All numbers are those of an evaluation of a run, with the same provenance. In the place of how
    samples were drawn, `samples` has their file, its hash and their number.

    Args:
        path: the path of the samples, as in `diffjax.evaluation.sample_files.read_samples`.
        dataset: the real images.
        extractors: the networks whose features are compared, the main one first.
        folder: for the results; it has no run.
        beat: called at each batch of real images.

    Returns:
        The content of `evaluation.json`.

    Raises:
        UserError: samples of another size, too few of them, or a folder that has a run.
    """
    folder = Path(folder)
    if (folder / workdirs.CONFIG).exists():
        raise UserError(
            f"{folder} has a run, whose evaluation would be lost: choose another folder"
        )
    samples = read_samples(path, dataset)
    if len(samples.images) < FEWEST_IMAGES:
        raise UserError(
            f"{path} has {len(samples.images)} samples, and distances need {FEWEST_IMAGES}"
        )
    make_writable(folder)
    references = [reference_of(dataset, extractor, beat) for extractor in extractors]
    main, *others = compare_each(samples.images.batches(), samples.labels, references)
    summary = {
        "samples": samples.facts,
        **main,
        "extractors": {
            real.extractor.name: {**numbers, "neighbours": None}  # of pixels: they are above
            for real, numbers in zip(references[1:], others, strict=True)
        },
        "by_nfe": [],
    }
    shown = samples.images.take(np.arange(min(len(samples.images), 100)))
    save_neighbours(folder, references[0].train_images, shown)
    write_json(folder / workdirs.EVALUATION, summary)
    return summary
