"""Published networks of texts at their own sizes, to plan: sampling, LoRA and full tuning.

    python -m experiments.plan --config=configs/published.py:model=FLUX.1-dev --topology=h100:8 \
        --sampling --analytic
    python -m experiments.plan --config=configs/published.py:model=SDXL --topology=v5p:4x4x4 \
        --analytic

Models: SD1, SDXL, SD3.5-Medium, SD3.5-Large, FLUX.1-dev, FLUX.1-schnell, FLUX.2-klein-4B and
FLUX.2-dev; images of 1024x1024 pixels (SD1: 512x512) as latents, and token states of texts, both
made before. docs/planning.md has the table; `--config.lora.rank=16` plans LoRA. To train a
published pipeline, take configs/finetune.py.
"""

from typing import Any

from ml_collections import ConfigDict

from diffjax import choices
from diffjax.data import latents
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.models.families import settings_of
from diffjax.models.flux.published import FAMILY as FLUX
from diffjax.models.flux2.published import FAMILY as FLUX2
from diffjax.models.sd3.published import FAMILY as SD3
from diffjax.models.stable_diffusion.published import FAMILY as STABLE_DIFFUSION
from diffjax.optimizers.descent import descent
from diffjax.pretrained.family import Denoiser
from diffjax.spec import as_spec, spec

FAMILIES = {
    "SD1": STABLE_DIFFUSION,
    "SDXL": STABLE_DIFFUSION,
    "SD3.5-Medium": SD3,
    "SD3.5-Large": SD3,
    "FLUX.1-dev": FLUX,
    "FLUX.1-schnell": FLUX,
    "FLUX.2-klein-4B": FLUX2,
    "FLUX.2-dev": FLUX2,
}
NETWORKS: dict[str, Denoiser] = {name: family.size(name) for name, family in FAMILIES.items()}
_POD = {"dtype": "bfloat16", "scan": True, "remat": "full"}


def _model(denoiser: Denoiser) -> ConfigDict:
    """The network, in bfloat16, with one block compiled for all where its blocks are equal."""
    network = denoiser.network
    own = {name: as_spec(getattr(network, name)) for name in settings_of(network)}
    pod = {name: value for name, value in _POD.items() if name in own}
    return spec(type(network), **{**own, **pod})


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule."""
    models = {name: _model(denoiser) for name, denoiser in NETWORKS.items()}
    config = experiment(
        "published",
        arguments,
        data=spec(latents, path=""),
        extractor=spec(pixel_features, size=8),
        models=models,
        model="SDXL",
        optimizer=spec(descent, learning_rate=1e-5, warmup_steps=0),
    )
    name = next(name for name, model in models.items() if model == config.model)
    denoiser = NETWORKS[name]
    published: Any = FAMILIES[name].published
    published = published(denoiser)
    config.expected = ConfigDict({"image_shape": denoiser.image_shape, "num_images": 100_000})
    config.expected.condition = as_spec(denoiser.condition)
    config.ema_decays, config.weights = (), "live"
    config.batch_size = 64
    config.num_steps = 10_000
    config.sampling.solver = choices.copy(choices.SOLVERS[published.solver])
    config.sampling.num_steps = published.num_steps
    config.sampling.guidance_scale = published.guidance_scale
    config.mesh.update(data=1, fsdp=-1)
    return config
