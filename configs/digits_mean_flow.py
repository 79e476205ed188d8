"""Digits in one evaluation of the network: mean flow, trained from nothing (docs/objectives.md).

python -m experiments.train --config=configs/digits_mean_flow.py
"""

from ml_collections import ConfigDict

from diffjax import choices
from diffjax.data import digits
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import classifier_features
from diffjax.optimizers.descent import descent
from diffjax.optimizers.schedules import Cosine
from diffjax.spec import spec


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule."""
    config = experiment(
        "digits_mean_flow",
        arguments,
        data=spec(digits),
        extractor=spec(classifier_features, name="digits"),
        models=choices.MODELS_8X8,
        model="dit",
        objective="mean_flow",
        optimizer=spec(descent, learning_rate=2e-3, schedule=spec(Cosine, final_fraction=0.02)),
    )
    config.num_steps = 2_400
    config.ema_decays = (0.99, 0.999)
    config.sampling.num_steps = 1
    config.sampling.guidance_scale = 1.0
    config.log_every_steps = 50
    config.sample_every_steps = 400
    config.checkpoint_every_steps = 800
    config.evaluation.num_steps = (1, 2, 5)
    return config
