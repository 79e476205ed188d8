"""The classifier that was trained on one's own data, found by what the data are."""

import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from diffjax.data import DataSet
from diffjax.evaluation.extractors.features import (
    Extractor,
    classifier_features,
    pixel_features,
)
from diffjax.host.files import place_of

CACHE = "~/.cache/diffjax/classifiers"


def own_classifier(size: int = 8, cache: str = CACHE) -> Extractor:
    """Extractor of the features and logits of the classifier of these very training images.

    `python -m experiments.train_classifier --config=CONFIG` trains it and writes its file to the
    cache, under a hash of the training images and classes; from then on evaluations use it, with
    its hash in the provenance. Before that, the features are `pixel_features(size)`, and there is
    no accuracy.

    Args:
        size: the size of the averaged pixels, until there is a classifier.
        cache: the folder of the classifiers.

    Example:
        >>> from diffjax.data import digits
        >>> own_classifier(cache="nowhere").of(digits()).name
        'pixels:8x8'
    """
    return replace(pixel_features(size), of_data=partial(_found, size, cache))


def file_for(dataset: DataSet, cache: str = CACHE) -> Path:
    """Where the classifier of a data set is, or would be.

    Its name has a hash of the training images, the classes and the shape, so other data, another
    split or another size have no file.
    """
    facts = [dataset.reference.fingerprint(), *dataset.label_names, *dataset.image_shape]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return place_of(cache) / f"{dataset.name}-{key[:16]}.npz"


def _found(size: int, cache: str, dataset: DataSet) -> Extractor:
    file = file_for(dataset, cache) if dataset.num_classes else None
    if file is None or not file.exists():
        return pixel_features(size)
    return replace(classifier_features(str(file)), name=f"classifier:own:{dataset.name}")
