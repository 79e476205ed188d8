"""Digits of 4x4 pixels: the base model of a cascade (docs/cascades.md).

python -m experiments.train --config=configs/digits_small.py
"""

from ml_collections import ConfigDict

from diffjax import choices
from diffjax.data import digits, downscaled
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.models.dit import DiT
from diffjax.optimizers.descent import descent
from diffjax.optimizers.schedules import Cosine
from diffjax.spec import spec


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule."""
    config = experiment(
        "digits_small",
        arguments,
        data=spec(downscaled, dataset=spec(digits), factor=2),
        extractor=spec(pixel_features, size=4),
        models={
            **choices.MODELS_8X8,
            "dit": spec(DiT, patch_size=1, hidden_size=64, depth=4, num_heads=2),
        },
        model="dit",
        optimizer=spec(descent, learning_rate=2e-3, schedule=spec(Cosine, final_fraction=0.02)),
        guidance_scale=1.5,
        num_steps=9,
        evaluated_steps=(2, 5, 9),
    )
    config.num_steps = 1_200
    config.ema_decays = (0.99, 0.999)
    config.log_every_steps = 50
    config.sample_every_steps = 200
    config.checkpoint_every_steps = 400
    return config
