r"""ImageNet at 64x64 as EDM was trained on it: its version of ADM's network, for a pod.

    python -m experiments.train --config=configs/imagenet64_edm.py
    python -m experiments.plan --config=configs/imagenet64_edm.py --topology=h100:8

As published, but for half precision: bfloat16 here, float16 with a loss scaled by 100 there. As in
the authors' command there is no augmentation, and no flip. `configs/cifar10_edm.py` says what of
it is tested.

Not yet run. Published: FID-50K of 1.36 with 511 evaluations and churn, after 2,500 million images
(Karras et al. 2022, arXiv:2206.00364); about 13 days on 32 A100s. `docs/data.md` explains how the
set is prepared.
"""

from ml_collections import ConfigDict

from diffjax.data import tfds_images
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.models.edm import DhariwalUNet
from diffjax.optimizers.adam import Adam
from diffjax.optimizers.descent import descent
from diffjax.optimizers.schedules import RiseFromZero
from diffjax.process.precond import LogSNRLabel
from diffjax.spec import spec

MODELS = {"EDM": spec(DhariwalUNet, dtype="bfloat16")}
BATCH_SIZE = 4_096


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule.

    Models: EDM.
    """
    config = experiment(
        "imagenet64-edm",
        arguments,
        data=spec(tfds_images, name="imagenet_resized/64x64", test_split="validation"),
        extractor=spec(pixel_features, size=8),
        models=MODELS,
        model="EDM",
        objective="edm",
        optimizer=spec(
            descent,
            learning_rate=1e-4,
            warmup_steps=0,
            schedule=spec(RiseFromZero, steps=10_000_000 // BATCH_SIZE),
            # Their loss is a sum over these numbers, and ours the mean.
            rule=spec(Adam, eps=1e-8 / (64 * 64 * 3)),
            clip_norm=float("inf"),
        ),
        guidance_scale=1.0,
    )
    config.precond.noise_label = spec(LogSNRLabel, scale=-0.125)
    config.expected = ConfigDict(
        {"image_shape": (64, 64, 3), "num_classes": 1_000, "num_images": 1_281_167}
    )
    config.batch_size = BATCH_SIZE
    config.num_steps = 2_500_000_000 // BATCH_SIZE
    config.condition_dropout = 0.0
    config.ema_decays = (0.999943,)  # a half-life of 50 million images: 0.5^(4,096/50,000,000)
    config.ema_rampup_ratio = 0.05
    config.weights = "ema-0.999943"
    config.sample_every_steps = 10_000
    config.checkpoint_every_steps = 10_000
    config.evaluation.num_samples = 50_000
    config.evaluation.solvers = ("heun",)
    config.evaluation.num_steps = (40,)
    return config
