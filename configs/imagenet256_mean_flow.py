r"""ImageNet at 256x256 in one evaluation: mean flow on latents of 32x32x4; for a TPU or GPU pod.

    python -m experiments.plan --config=configs/imagenet256_mean_flow.py --topology=v5e:4x4
    python -m experiments.train --config=configs/imagenet256_mean_flow.py --config.data.path=FOLDER

FOLDER is that of configs/imagenet256.py. Not yet run: no such machine was available.

Published, FID-50K: 3.43 with one evaluation and 2.93 with two, by DiT-XL/2 in 240 epochs (Geng et
al. 2025, arXiv:2505.13447). Guidance is in the objective (`omega`, `kappa`), so none is added when
samples are drawn. The authors' code has these settings for DiT-B/4, with omega=1, kappa=0.5 and
guided_below=1 (FID 11.4); those of XL/2 below are of another public implementation.
"""

from ml_collections import ConfigDict

from diffjax.data import latents
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.models import DiT, dit
from diffjax.optimizers.adam import AdamW
from diffjax.optimizers.descent import descent
from diffjax.spec import spec
from diffjax.training.sharding import SPREAD

POD = {"dtype": "bfloat16", "scan": True, "remat": "products"}
MODELS = {name: spec(DiT, **{**size.settings, **POD}) for name, size in dit.SIZES.items()}


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, times, model, optimizer, schedule.

    Models: DiT-S/2 … DiT-XL/8.
    """
    config = experiment(
        "imagenet256_mean_flow",
        arguments,
        data=spec(latents, scale=0.18215, name="ImageNet latents"),
        extractor=spec(pixel_features, size=8),
        models=MODELS,
        model="DiT-XL/2",
        objective="mean_flow",
        optimizer=spec(descent, learning_rate=1e-4, rule=spec(AdamW, b2=0.95), warmup_steps=0),
    )
    if "kappa" in config.objective:
        config.objective.update(omega=0.2, kappa=0.92, guided_below=0.75)
    config.expected = ConfigDict(
        {"image_shape": (32, 32, 4), "num_classes": 1_000, "num_images": 1_281_167}
    )
    config.num_steps = 1_201_000  # 240 epochs
    config.batch_size = 256
    config.ema_decays = (0.9999,)
    config.weights = "ema-0.9999"
    config.mesh.update(data=-1, fsdp=-1)  # groups of up to 16 chips
    config.sharding_rules = SPREAD
    config.sampling.num_steps = 1
    config.sampling.guidance_scale = 1.0
    config.sample_every_steps = 10_000
    config.checkpoint_every_steps = 10_000
    config.evaluation.num_samples = 50_000
    config.evaluation.solvers = ("flow_map",)
    config.evaluation.num_steps = (1, 2)
    return config
