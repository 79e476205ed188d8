"""Handwritten digits (8x8, in scikit-learn): a class-conditional generator in minutes on a CPU.

python -m experiments.train --config=configs/digits.py
python -m experiments.train --config=configs/digits.py:objective=ddpm,model=unet
"""

from ml_collections import ConfigDict

from diffjax import choices
from diffjax.data import digits
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import classifier_features
from diffjax.optimizers.adam import adamw
from diffjax.optimizers.schedules import Cosine
from diffjax.spec import spec


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule."""
    config = experiment(
        "digits",
        arguments,
        data=spec(digits),
        extractor=spec(classifier_features, name="digits"),
        models=choices.MODELS_8X8,
        model="dit",
        models_of_targets=choices.MODELS_OF_TARGETS,
        optimizer=spec(adamw, learning_rate=2e-3, schedule=spec(Cosine, final_fraction=0.02)),
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
