r"""Any folder of captioned images: a text-to-image model on latents.

    python -m experiments.encode_latents --config=configs/captions.py --config.data.path=IMAGES \
        --config.data.image_size=256 --codec=taef2:path=WEIGHTS --text=ENCODER --out=latents
    python -m experiments.train --config=configs/captions.py:latents=latents

Captions are in `metadata.jsonl`, or in `NAME.txt` beside `NAME.png`. The network `dit` is
`DiT-S/2`, whose blocks attend to the states of the captions.
"""

from ml_collections import ConfigDict

from diffjax.data import captioned_folder
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.models import DiT, dit
from diffjax.optimizers.descent import descent
from diffjax.spec import spec

MODELS = {
    "dit": spec(DiT, **dit.SIZES["DiT-S/2"].settings, qk_norm=True),
    **{name: spec(DiT, **size.settings) for name, size in dit.SIZES.items()},
}


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule, latents.

    Models: dit, DiT-S/2 … DiT-XL/8.
    """
    config = experiment(
        "captions",
        arguments,
        data=spec(captioned_folder),
        extractor=spec(pixel_features, size=8),
        models=MODELS,
        model="dit",
        optimizer=spec(descent, learning_rate=2e-4),
        guidance_scale=3.0,
    )
    config.num_steps = 100_000
    config.batch_size = 64
    return config
