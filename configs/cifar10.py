r"""CIFAR-10 (32x32 colour) through TFDS, for a GPU or a TPU.

    python -m experiments.train --config=configs/cifar10.py
    python -m experiments.train --config=configs/cifar10.py:objective=ddpm,model=unet
    python -m experiments.train --config=configs/cifar10.py:model=DiT-S/2
    python -m experiments.train \
        --config=configs/cifar10.py:objective=edm,noise_label=log_sigma,model=DDPM++

The set must have been prepared once on a machine that can download it; `docs/data.md` explains how.
Not yet run. Its Fréchet distance is on averaged pixels and can't be compared with published FIDs;
`experiments.evaluate --extractor=inception` measures those (docs/evaluation.md).
"""

from ml_collections import ConfigDict

from diffjax.data import tfds_images
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.models import DiT, UNet, dit
from diffjax.models.ddpm import DDPMUNet
from diffjax.models.edm import SongUNet
from diffjax.models.edm.network import NCSNPP
from diffjax.optimizers.descent import descent
from diffjax.spec import as_spec, spec

MODELS = {
    "unet": spec(
        UNet,
        channels=128,
        channel_multipliers=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16,),
        head_channels=256,
        scale_shift=False,
        dropout=0.1,
    ),
    "unet-64": spec(UNet),  # 64, 128, 128 channels: small enough to benchmark on a CPU
    "DDPM": spec(DDPMUNet),
    "DDPM++": spec(SongUNet),
    "NCSN++": spec(SongUNet, **{name: as_spec(value) for name, value in NCSNPP.items()}),
    **{name: spec(DiT, **size.settings) for name, size in dit.SIZES.items()},
}


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule.

    Models: unet, unet-64, DDPM, DDPM++, NCSN++ (of EDM), DiT-S/2 … DiT-XL/8.
    """
    config = experiment(
        "cifar10",
        arguments,
        data=spec(tfds_images, name="cifar10"),
        extractor=spec(pixel_features, size=8),
        models=MODELS,
        model="unet",
        optimizer=spec(descent, learning_rate=2e-4, warmup_steps=5_000),
    )
    config.expected = ConfigDict(
        {"image_shape": (32, 32, 3), "num_classes": 10, "num_images": 50_000}
    )
    config.num_steps = 400_000
    config.augment.flip_probability = 0.5
    config.ema_decays = (0.999, 0.9999)
    config.weights = "ema-0.9999"
    config.sample_every_steps = 10_000
    config.checkpoint_every_steps = 10_000
    config.evaluation.num_samples = 10_000
    return config
