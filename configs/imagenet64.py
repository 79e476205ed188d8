"""ImageNet at 64x64 through TFDS (`imagenet_resized/64x64`), for a TPU or GPU machine.

    python -m experiments.train --config=configs/imagenet64.py
    python -m experiments.train --config=configs/imagenet64.py:objective=edm,model=unet

The set must have been prepared once on a machine that can download it; `docs/data.md` explains how.
Not yet run. Published, FID-50K: 1.36 for EDM at 511 evaluations with churn (Karras et al. 2022,
arXiv:2206.00364), on its version of ADM's network, `model=EDM`, with `noise_label=log_sigma`.
"""

from ml_collections import ConfigDict

from diffjax.data import tfds_images
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.models import ADM, EDM2, DiT, UNet, adm, dit, edm2
from diffjax.models.edm import DhariwalUNet
from diffjax.optimizers.descent import descent
from diffjax.spec import spec

MODELS = {
    "unet": spec(
        UNet,
        channels=192,
        channel_multipliers=(1, 2, 3, 4),
        num_res_blocks=3,
        attention_resolutions=(32, 16, 8),
        head_channels=64,
        dtype="bfloat16",
    ),
    "ADM-64": spec(ADM, **{**adm.SIZES["ADM-64"].of_network, "dtype": "bfloat16"}),
    "EDM": spec(DhariwalUNet, dtype="bfloat16"),
    **{
        name: spec(DiT, **{**size.settings, "dtype": "bfloat16"})
        for name, size in dit.SIZES.items()
    },
    **{
        name: spec(EDM2, **{**size.settings, "dtype": "bfloat16"})
        for name, size in edm2.SIZES.items()
    },
}


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule.

    Models: unet, ADM-64, EDM, DiT-S/2 … DiT-XL/8, EDM2-XXS … EDM2-XXL.
    """
    config = experiment(
        "imagenet64",
        arguments,
        data=spec(tfds_images, name="imagenet_resized/64x64", test_split="validation"),
        extractor=spec(pixel_features, size=8),
        models=MODELS,
        model="unet",
        optimizer=spec(descent, learning_rate=1e-4, warmup_steps=10_000),
    )
    config.expected = ConfigDict(
        {"image_shape": (64, 64, 3), "num_classes": 1_000, "num_images": 1_281_167}
    )
    config.num_steps = 1_000_000
    config.batch_size = 1_024
    config.augment.flip_probability = 0.5
    config.ema_decays = (0.9999,)
    config.weights = "ema-0.9999"
    config.mesh.update(data=1, fsdp=-1)
    config.sample_every_steps = 10_000
    config.checkpoint_every_steps = 10_000
    config.evaluation.num_samples = 50_000
    return config
