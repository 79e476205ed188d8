r"""ImageNet at 512x512 as latents of 64x64x4: EDM2, for a TPU or GPU pod.

    python -m experiments.plan --config=configs/imagenet512.py:model=EDM2-XS --topology=v5e:4x4
    python -m experiments.train --config=configs/imagenet512.py:model=EDM2-S \
        --config.data.path=FOLDER
    python -m experiments.train --config=configs/imagenet512.py:model=EDM2-S \
        --config.data.path=FOLDER --config.init_from=edm2-img512-s-2147483-0.130.pkl

FOLDER holds latents of Stable Diffusion's autoencoder, as experiments.encode_latents writes them;
`:latents=FOLDER` also names what encoded them. Each channel is brought to mean 0 and standard
deviation of 0.5, by the statistics of these latents. Another size has another learning rate and
length: 0.012 (XS), 0.01 (S), 0.009 (M), 0.008 (L), 0.007 (XL), 0.0065 (XXL), all with batches of
2,048; and 1,048,576 (XS to M), 917,504 (L), 655,360 (XL) and 458,752 (XXL) steps.
Not yet run: no such machine was available.

Published, FID-50K at 63 evaluations (Karras et al. 2024, arXiv:2312.02696, table 2), without
guidance and with that of an unconditional XS: XS 3.53, 2.91; S 2.56, 2.23; M 2.25, 2.01; L 2.06,
1.88; XL 1.96, 1.85; XXL 1.91, 1.81. With a weaker model of the same condition (autoguidance, Karras
et al. 2024, arXiv:2406.02507): S 1.34, XXL 1.25.
"""

from ml_collections import ConfigDict

from diffjax.data import latents
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.models import EDM2, edm2
from diffjax.optimizers.descent import descent
from diffjax.optimizers.normalised import NormalisedAdam
from diffjax.optimizers.schedules import InverseSqrt
from diffjax.spec import spec
from diffjax.training.sharding import SPREAD

# For pods: bfloat16, and no more kept for the gradient than the results of products.
POD = {"dtype": "bfloat16", "remat": "products"}
MODELS = {name: spec(EDM2, **{**size.settings, **POD}) for name, size in edm2.SIZES.items()}


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule, codec, latents.

    Models: EDM2-XXS … EDM2-XXL.
    """
    config = experiment(
        "imagenet512",
        arguments,
        data=spec(latents, name="ImageNet latents"),
        extractor=spec(pixel_features, size=8),
        models=MODELS,
        model="EDM2-S",
        objective="edm2",
        optimizer=spec(
            descent,
            rule=spec(NormalisedAdam),
            learning_rate=0.01,
            warmup_steps=4_883,  # 10 M images
            schedule=spec(InverseSqrt, constant_steps=70_000),
            clip_norm=float("inf"),
        ),
    )
    config.data.update(scale=0.5, normalisation="channels")  # also of `:latents=FOLDER`
    config.expected = ConfigDict(
        {"image_shape": (64, 64, 4), "num_classes": 1_000, "num_images": 1_281_167}
    )
    config.num_steps = 1_048_576  # 2,147 M images
    config.batch_size = 2_048
    config.condition_dropout = 0.0  # guidance is by another network
    config.ema_decays = ()
    config.ema_lengths = (0.05, 0.1)
    config.weights = "power-0.1"
    config.mesh.update(data=-1, fsdp=-1)  # groups of up to 16 chips
    config.sharding_rules = SPREAD
    config.sampling.num_steps = 32  # of Heun: 63 evaluations
    config.sampling.guidance_scale = 1.0
    config.snapshot_every_steps = 4_096  # 8 M images
    config.sample_every_steps = 8_192
    config.checkpoint_every_steps = 8_192
    config.evaluation.num_samples = 50_000
    config.evaluation.solvers = ("heun",)
    config.evaluation.num_steps = (32,)
    return config
