"""A cascade of digits: a model of 4x4 pixels, and one that enlarges to 8x8 (docs/cascades.md).

python -m experiments.train --config=configs/digits_upscale.py --workdir=runs/digits_upscale
python -m experiments.train --config=configs/digits_small.py --workdir=runs/digits_small
python -m experiments.sample --workdir=runs/digits_small --then=runs/digits_upscale,level=0.2
"""

from ml_collections import ConfigDict

from diffjax import choices
from diffjax.data import digits, upscaling
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import classifier_features
from diffjax.optimizers.descent import descent
from diffjax.optimizers.schedules import Cosine
from diffjax.process import paths
from diffjax.spec import spec


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule."""
    config = experiment(
        "digits_upscale",
        arguments,
        data=spec(
            upscaling, dataset=spec(digits), factor=2, path=spec(paths.Cosine), most_level=0.5
        ),
        extractor=spec(classifier_features, name="digits"),
        models=choices.MODELS_8X8,
        model="dit",
        optimizer=spec(descent, learning_rate=2e-3, schedule=spec(Cosine, final_fraction=0.02)),
    )
    config.num_steps = 1_200
    config.ema_decays = (0.99, 0.999)
    config.sampling.num_steps = 5
    config.sampling.guidance_scale = 1.0
    config.log_every_steps = 50
    config.sample_every_steps = 200
    config.checkpoint_every_steps = 400
    config.evaluation.num_steps = (2, 5)
    return config
