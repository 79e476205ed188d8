"""Any folder of images: a subfolder a class, or images side by side for an unconditional model.

    python -m experiments.train --config=configs/image_folder.py --config.data.path=FOLDER

Images are cropped to a square and resized to `--config.data.image_size`; the number of steps is for
some thousands of them. `--dry_run` reports which size and number of steps suit a folder, and reads
some of its images. The network `dit` is `DiT-S/2`. The Fréchet distance is on averaged pixels,
which is a weak measure: `experiments.evaluate --extractor=inception` has others
(docs/evaluation.md).
Without subfolders there are no labels to guide with: add `--config.sampling.guidance_scale=1`.
"""

from ml_collections import ConfigDict

from diffjax.data import image_folder
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.models import ADM, DiT, UNet, adm, dit
from diffjax.models.ddpm import DDPMUNet
from diffjax.optimizers.adam import adamw
from diffjax.spec import spec

MODELS = {
    "unet": spec(
        UNet,
        channels=64,
        channel_multipliers=(1, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16,),
        head_channels=64,
    ),
    "dit": spec(DiT, **dit.SIZES["DiT-S/2"].settings),
    "DDPM-256": spec(
        DDPMUNet,
        channel_multipliers=(1, 1, 2, 2, 4, 4),
        dropout=0.0,
    ),
    **{name: spec(ADM, **size.of_network) for name, size in adm.SIZES.items()},
    **{name: spec(DiT, **size.settings) for name, size in dit.SIZES.items()},
}


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule.

    Models: unet, dit, DDPM-256, ADM-64 … ADM-512, DiT-S/2 … DiT-XL/8.
    """
    config = experiment(
        "image_folder",
        arguments,
        data=spec(image_folder),
        extractor=spec(pixel_features, size=8),
        models=MODELS,
        model="unet",
        optimizer=spec(adamw, learning_rate=2e-4),
    )
    config.num_steps = 100_000
    config.batch_size = 64
    config.augment.flip_probability = 0.5
    return config
