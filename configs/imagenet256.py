r"""ImageNet at 256x256 as latents of 32x32x4: diffusion transformers, for a TPU or GPU pod.

    python -m experiments.plan --config=configs/imagenet256.py:model=DiT-XL/2 --topology=v5e:4x4
    python -m experiments.train --config=configs/imagenet256.py:model=DiT-XL/2 \
        --config.data.path=FOLDER
    python -m experiments.train --config=configs/imagenet256.py:objective=iddpm,model=DiT-XL/2 \
        --config.data.path=FOLDER

Published weights go on by the objective of their paper, or by any other one:

    python -m experiments.train --config=configs/imagenet256.py:objective=dit,model=DiT-XL/2 \
        --config.data.path=FOLDER --config.init_from=DiT-XL-2-256x256.pt
    python -m experiments.train --config=configs/imagenet256.py:objective=sit,model=SiT-XL/2 \
        --config.data.path=FOLDER --config.init_from=SiT-XL-2-256x256.pt

FOLDER holds latents.npy, [1281167,32,32,4] of Stable Diffusion's autoencoder, and labels.npy;
docs/data.md has more. Pictures and distances are of the latents. `:latents=FOLDER`, written by
experiments.encode_latents, also names what encoded them, and they are of decoded images.
Not yet run: no such machine was available.

Published, FID-50K at 250 steps: DiT-XL/2 9.62 without guidance and 2.27 with 1.5 (7 M steps of 256
images; Peebles & Xie 2022, arXiv:2212.09748); SiT-XL/2 8.61 (ODE) and 2.06 (SDE, guidance 1.5; 7 M
steps; Ma et al. 2024, arXiv:2401.08740). At 400 K steps without guidance: 19.5 and 17.2. The noise
labels of DDT are from 0 to 1, as with objective=sit. Published results of LightningDiT are on other
latents, and those of DDT are with alignment to DINOv2.
"""

from ml_collections import ConfigDict

from diffjax.data import latents
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.models import DiT, ddt, dit, lightningdit, uvit
from diffjax.models.sit.network import SiT
from diffjax.models.sit.sizes import SIZES as SIT_SIZES
from diffjax.optimizers.descent import descent
from diffjax.spec import spec
from diffjax.training.sharding import SPREAD

# For pods: bfloat16, one block compiled for all, and no more kept for the gradient than products.
POD = {"dtype": "bfloat16", "scan": True, "remat": "products"}
MODELS = {
    name: spec(network, **{**size.settings, **POD})
    for network, sizes in (
        (DiT, dit.SIZES),
        (lightningdit.LightningDiT, lightningdit.SIZES),
        (ddt.DDT, ddt.SIZES),
        (uvit.UViT, uvit.SIZES),
    )
    for name, size in sizes.items()
}
# As published, with twice the channels, of which the second half is not used.
MODELS |= {
    name: spec(SiT, **{**size.settings, **POD}, out_channels=8) for name, size in SIT_SIZES.items()
}


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule, codec.

    Models: DiT-S/2 … DiT-XL/8, SiT-S/2 … SiT-XL/2, LightningDiT-B/1 … LightningDiT-1p6B/2,
    DDT-B/2 … DDT-XL/2, U-ViT-S/2 … U-ViT-H/4.
    """
    config = experiment(
        "imagenet256",
        arguments,
        data=spec(latents, scale=0.18215, name="ImageNet latents", label_names="imagenet"),
        extractor=spec(pixel_features, size=8),
        models=MODELS,
        model="DiT-XL/2",
        optimizer=spec(descent, learning_rate=1e-4, warmup_steps=0),
        guidance_scale=1.5,
    )
    config.expected = ConfigDict(
        {"image_shape": (32, 32, 4), "num_classes": 1_000, "num_images": 1_281_167}
    )
    config.num_steps = 400_000
    config.batch_size = 256
    config.ema_decays = (0.9999,)
    config.weights = "ema-0.9999"
    config.mesh.update(data=-1, fsdp=-1)  # groups of up to 16 chips
    config.sharding_rules = SPREAD
    config.sampling.num_steps = 125  # of Heun: 250 evaluations, twice that with guidance
    config.sample_every_steps = 10_000
    config.checkpoint_every_steps = 10_000
    config.evaluation.num_samples = 50_000
    config.evaluation.num_steps = (125,)
    return config
