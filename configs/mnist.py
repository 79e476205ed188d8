"""MNIST (28x28 grey digits) through TFDS.

    python -m experiments.train --config=configs/mnist.py

The set must have been prepared once on a machine that can download it; `docs/data.md` explains how.
Not yet run: the data set was not available.
"""

from ml_collections import ConfigDict

from diffjax import choices
from diffjax.data import tfds_images
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.optimizers.descent import descent
from diffjax.optimizers.schedules import Cosine
from diffjax.spec import spec


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule."""
    config = experiment(
        "mnist",
        arguments,
        data=spec(tfds_images, name="mnist"),
        extractor=spec(pixel_features, size=7),
        models=choices.MODELS_28X28,
        model="dit",
        models_of_targets=choices.MODELS_OF_TARGETS,
        optimizer=spec(descent, schedule=spec(Cosine, final_fraction=0.02)),
    )
    config.num_steps = 3_000
    config.batch_size = 64
    return config
