"""MNIST (28x28 grey digits) through TFDS.

    python -m experiments.train --config=configs/mnist.py

The set must have been prepared once on a machine that can download it; `docs/data.md` says how.
Not yet run: no such set was at hand. The networks are those of `configs/fashion_mnist.py`.
"""

from ml_collections import ConfigDict

from diffjax.data import tfds_images
from diffjax.evaluation.features import pixel_features
from diffjax.experiment import experiment
from diffjax.models import DiT, UNet
from diffjax.spec import spec

MODELS = {
    "dit": spec(DiT, patch_size=4, hidden_size=128, depth=4, num_heads=4),
    "unet": spec(
        UNet,
        channels=32,
        channel_multipliers=(1, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(7,),
        head_channels=32,
    ),
}


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model."""
    config = experiment(
        "mnist",
        arguments,
        data=spec(tfds_images, name="mnist"),
        extractor=spec(pixel_features, size=7),
        models=MODELS,
        model="dit",
    )
    config.num_steps = 3_000
    config.batch_size = 64
    config.optimizer.final_fraction = 0.02
    return config
