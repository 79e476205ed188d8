r"""CIFAR-10 as EDM was trained on it: class-conditional DDPM++, for a machine of 8 GPUs or TPUs.

    python -m experiments.train --config=configs/cifar10_edm.py
    python -m experiments.train --config=configs/cifar10_edm.py:model=NCSN++

Everything is as published: network, dropout, non-leaky augmentation, loss, Adam with its rate, and
average. On the same weights, images and random numbers the first 200 losses of a small network are
those of the authors' code (`tests/objectives/test_augmentation.py`). One thing differs: a gradient
that is not finite leaves the step out here, and is replaced by numbers there.

Not yet run. Published: FID-50K of 1.79 with 35 evaluations, after 200 million images (Karras et al.
2022, arXiv:2206.00364, table 2); about 2 days on 8 V100s. `docs/data.md` explains how the set is
prepared, `docs/evaluation.md` how such an FID is measured.
"""

from ml_collections import ConfigDict

from diffjax.data import tfds_images
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.models.edm import SongUNet
from diffjax.models.edm.network import NCSNPP
from diffjax.objectives.augmentation import NonLeaky
from diffjax.optimizers.adam import Adam
from diffjax.optimizers.descent import descent
from diffjax.optimizers.schedules import RiseFromZero
from diffjax.process.precond import LogSNRLabel
from diffjax.spec import as_spec, spec

MODELS = {
    "DDPM++": spec(SongUNet),
    "NCSN++": spec(SongUNet, **{name: as_spec(value) for name, value in NCSNPP.items()}),
}
BATCH_SIZE = 512


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule.

    Models: DDPM++, NCSN++.
    """
    config = experiment(
        "cifar10-edm",
        arguments,
        data=spec(tfds_images, name="cifar10"),
        extractor=spec(pixel_features, size=8),
        models=MODELS,
        model="DDPM++",
        objective="edm",
        optimizer=spec(
            descent,
            learning_rate=1e-3,
            warmup_steps=0,
            schedule=spec(RiseFromZero, steps=10_000_000 // BATCH_SIZE),
            # Their loss is a sum over these numbers, and ours the mean.
            rule=spec(Adam, eps=1e-8 / (32 * 32 * 3)),
            clip_norm=float("inf"),
        ),
        guidance_scale=1.0,
    )
    config.precond.noise_label = spec(LogSNRLabel, scale=-0.125)
    config.wrappers = (spec(NonLeaky),)
    config.expected = ConfigDict(
        {"image_shape": (32, 32, 3), "num_classes": 10, "num_images": 50_000}
    )
    config.batch_size = BATCH_SIZE
    config.num_steps = 200_000_000 // BATCH_SIZE
    config.condition_dropout = 0.0
    config.ema_decays = (0.99929,)  # half of it is of the last 500,000 images: 0.5^(512/500,000)
    config.ema_rampup_ratio = 0.05
    config.weights = "ema-0.99929"
    config.sample_every_steps = 10_000
    config.checkpoint_every_steps = 10_000
    config.evaluation.num_samples = 50_000
    config.evaluation.solvers = ("heun",)
    config.evaluation.num_steps = (18,)
    return config
