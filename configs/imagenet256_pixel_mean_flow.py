r"""ImageNet at 256x256 in one evaluation without a codec: pixel mean flow on patches of 16 pixels.

    python -m experiments.plan --config=configs/imagenet256_pixel_mean_flow.py --topology=v5e:4x4
    python -m experiments.train --config=configs/imagenet256_pixel_mean_flow.py \
        --config.data.path=FOLDER

FOLDER has a subfolder of images for each of the 1,000 classes. Not yet run: no such machine was
available.

Published, FID-50K at one evaluation: 3.12 (B/16), 2.52 (L/16), 2.22 (H/16; Lu et al. 2026,
arXiv:2601.22158). Settings are those of pMF_B_16_config.yml, pmfDiT.py and trainstate_util.py of
Lyy-iiis/pMF. What differs: no perceptual losses (theirs are 0.4·LPIPS and 0.1·ConvNeXt up to
t = 0.8), which decide much of these figures; the network is JiT with their depth of 16 blocks, of
one head, where theirs has 8 further blocks for the velocity in training, and scale and interval of
guidance as inputs (here 8.5 between t = 0.1 and 0.7, at which it is sampled); Muon leaves the first
and the last layer to AdamW.
"""

from ml_collections import ConfigDict

from diffjax.data import image_folder
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.models import jit
from diffjax.optimizers.adam import AdamW
from diffjax.optimizers.descent import descent
from diffjax.optimizers.muon import Muon
from diffjax.spec import spec
from diffjax.training.sharding import SPREAD

POD = {"dtype": "bfloat16", "scan": True, "remat": "products"}
DEPTHS = {"B": 16, "L": 32, "H": 48}
MODELS = {
    f"JiT-{size}/16": spec(
        jit.JiT, **{**jit.SIZES[f"JiT-{size}/16"].settings, **POD, "depth": depth}
    )
    for size, depth in DEPTHS.items()
}
HALF_LIVES = (500_000, 1_000_000, 2_000_000)  # of averages, in images
DECAYS = tuple(round(0.5 ** (1024 / images), 5) for images in HALF_LIVES)


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule.

    Models: JiT-B/16, JiT-L/16, JiT-H/16.
    """
    times = "" if "times=" in arguments else "times=logit_normal_jit"
    config = experiment(
        "imagenet256_pixel_mean_flow",
        ",".join(filter(None, (arguments, times))),
        data=spec(image_folder, test_fraction=0.0),
        extractor=spec(pixel_features, size=8),
        models=MODELS,
        model="JiT-B/16",
        objective="pmf",
        optimizer=spec(
            descent,
            learning_rate=1e-3,
            rule=spec(Muon, adamw=spec(AdamW, b2=0.95), adamw_share=1.0),
            clip_norm=float("inf"),
            warmup_steps=0,
        ),
    )
    if "guided_above" in config.objective:
        config.objective.update(kappa=1.0 - 1.0 / 8.5, guided_above=0.1, guided_below=0.7)
    config.expected = ConfigDict(
        {"image_shape": (256, 256, 3), "num_classes": 1_000, "num_images": 1_281_167}
    )
    config.data.image_size = 256
    config.batch_size = 1024
    config.num_steps = 320 * 1_251
    config.ema_decays = DECAYS
    config.ema_rampup_ratio = 0.05
    config.weights = f"ema-{DECAYS[1]}"
    config.mesh.update(data=-1, fsdp=-1)  # groups of up to 16 chips
    config.sharding_rules = SPREAD
    config.sampling.num_steps = 1
    config.sample_every_steps = 10_000
    config.checkpoint_every_steps = 10_000
    config.evaluation.num_samples = 50_000
    config.evaluation.solvers = ("flow_map",)
    config.evaluation.num_steps = (1,)
    return config
