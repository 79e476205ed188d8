"""Handwritten digits (8x8, in scikit-learn): a class-conditional generator in minutes on a CPU.

python -m experiments.train --config=configs/digits.py
python -m experiments.train --config=configs/digits.py:objective=ddpm,model=unet
"""

from ml_collections import ConfigDict

from diffjax.data import digits
from diffjax.evaluation.features import classifier_features
from diffjax.experiment import experiment
from diffjax.models import DiT, UNet
from diffjax.spec import spec

MODELS = {
    "dit": spec(DiT, patch_size=2, hidden_size=64, depth=4, num_heads=2),
    "unet": spec(
        UNet,
        channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        head_channels=32,
    ),
}


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model."""
    config = experiment(
        "digits",
        arguments,
        data=spec(digits),
        extractor=spec(classifier_features, name="digits"),
        models=MODELS,
        model="dit",
    )
    config.num_steps = 1_200
    config.optimizer.learning_rate = 2e-3
    config.optimizer.final_fraction = 0.02
    config.ema_decays = (0.99, 0.999)
    config.sampling.num_steps = 9
    config.sampling.guidance_scale = 1.5
    config.log_every_steps = 50
    config.sample_every_steps = 200
    config.checkpoint_every_steps = 400
    config.evaluation.num_steps = (2, 5, 9)
    return config
