"""Single pixels of eight colours: a distribution that is known, to try comparisons on.

python -m experiments.train --config=configs/colours.py
"""

from ml_collections import ConfigDict

from diffjax.data import colours
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.models import DiT
from diffjax.optimizers.descent import descent
from diffjax.optimizers.schedules import Cosine
from diffjax.spec import spec

MODELS = {"dit": spec(DiT, patch_size=1, hidden_size=64, depth=2, num_heads=1)}


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times."""
    config = experiment(
        "colours",
        arguments,
        data=spec(colours),
        extractor=spec(pixel_features, size=1),
        models=MODELS,
        model="dit",
        optimizer=spec(descent, learning_rate=2e-3, schedule=spec(Cosine, final_fraction=0.02)),
    )
    config.num_steps = 1_200
    config.batch_size = 256
    config.condition_dropout = 0.0
    config.ema_decays = (0.99,)
    config.weights = "ema-0.99"
    config.sampling.guidance_scale = 1.0
    config.log_every_steps = 50
    config.sample_every_steps = 1_200
    config.checkpoint_every_steps = 1_200
    config.evaluation.num_samples = 8_000
    config.evaluation.batch_size = 8_000
    config.evaluation.num_steps = (9, 18)
    return config
