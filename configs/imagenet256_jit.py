r"""ImageNet at 256x256 without a codec: JiT on patches of 16x16 pixels; for a TPU or GPU pod.

    python -m experiments.plan --config=configs/imagenet256_jit.py --topology=v5e:4x4
    python -m experiments.train --config=configs/imagenet256_jit.py:model=JiT-L/16 \
        --config.data.path=FOLDER

FOLDER has a subfolder of images for each of the 1,000 classes. Not yet run: no such machine was
available. Models with patches of 32 take images of 512 pixels, for which the authors double the
noise too.

Published, FID-50K with guidance in an interval, after 200 and 600 epochs: 4.37 and 3.66 (B/16),
2.79 and 2.36 (L/16), 2.29 and 1.86 (H/16), 2.15 and 1.82 (G/16; Li & He 2025, arXiv:2511.13720).
"""

from ml_collections import ConfigDict

from diffjax.data import image_folder
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.lookup import guidance_called
from diffjax.models import jit
from diffjax.optimizers.adam import AdamW
from diffjax.optimizers.descent import descent
from diffjax.spec import spec
from diffjax.training.sharding import SPREAD

POD = {"dtype": "bfloat16", "scan": True, "remat": "products"}
DROPOUT = {"H": 0.2, "G": 0.2}  # B and L have none.
MODELS = {
    name: spec(jit.JiT, **{**size.settings, **POD}, dropout=DROPOUT.get(name[4], 0.0))
    for name, size in jit.SIZES.items()
}


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule.

    Models: JiT-B/16 … JiT-G/32.
    """
    config = experiment(
        "imagenet256_jit",
        arguments,
        data=spec(image_folder, test_fraction=0.0),
        extractor=spec(pixel_features, size=8),
        models=MODELS,
        model="JiT-B/16",
        objective="jit",
        optimizer=spec(
            descent,
            learning_rate=2e-4,
            rule=spec(AdamW, b2=0.95),
            clip_norm=float("inf"),
            warmup_steps=6_255,  # 5 epochs
        ),
        guidance_scale=2.9,
    )
    side = 16 * config.model.patch_size
    config.data.image_size = side
    config.expected = ConfigDict(
        {"image_shape": (side, side, 3), "num_classes": 1_000, "num_images": 1_281_167}
    )
    config.num_steps = 250_200  # 200 epochs
    config.batch_size = 1_024
    config.augment.flip_probability = 0.5
    config.ema_decays = (0.9996, 0.9998, 0.9999)
    config.weights = "ema-0.9999"
    config.mesh.update(data=-1, fsdp=-1)  # groups of up to 16 chips
    config.sharding_rules = SPREAD
    config.sampling.num_steps = 50  # of Heun
    config.sampling.guidance = guidance_called("cfg+limited_jit")
    config.sample_every_steps = 10_000
    config.checkpoint_every_steps = 10_000
    config.evaluation.num_samples = 50_000
    config.evaluation.num_steps = (50,)
    return config
