"""Emoji by their names: a text-to-image model from nothing, on two CPU cores.

    python -m experiments.prepare_emoji
    python -m experiments.train --config=configs/emoji.py
    python -m experiments.sample --workdir=runs/emoji --prompts="green heart"
    python -m experiments.match_prompts --workdir=runs/emoji

The network predicts clean latents from large patches, as JiT does: with 16 tokens of a picture most
of the time goes into parameters, and these learn what the texts mean.
"""

from pathlib import Path

from ml_collections import ConfigDict

from diffjax.data.latents import FACTS, latents, latents_in
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.models import DiT
from diffjax.optimizers.adam import AdamW
from diffjax.optimizers.descent import descent
from diffjax.optimizers.schedules import Cosine
from diffjax.spec import spec

LATENTS = "data/emoji/latents"
MODELS = {
    "dit": spec(DiT, patch_size=4, hidden_size=256, depth=6, num_heads=4, qk_norm=True),
    "dit-2": spec(DiT, patch_size=2, hidden_size=192, depth=6, num_heads=3, qk_norm=True),
}


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule, latents.

    Models: dit (patches of 4), dit-2 (patches of 2).
    """
    there = (Path(LATENTS) / FACTS).is_file()
    config = experiment(
        "emoji",
        arguments,
        data=latents_in(LATENTS) if there else spec(latents, path=LATENTS),
        extractor=spec(pixel_features, size=8),
        models=MODELS,
        model="dit",
        objective="jit",
        optimizer=spec(
            descent,
            learning_rate=8e-4,
            warmup_steps=200,
            rule=spec(AdamW, b2=0.99),
            schedule=spec(Cosine, final_fraction=0.05),
        ),
        guidance_scale=3.0,
        num_steps=16,
        evaluated_steps=(16,),
    )
    config.data.normalisation = "channels"
    config.num_steps = 10_000
    config.batch_size = 32
    config.ema_decays = (0.998,)
    config.weights = "ema-0.998"
    config.log_every_steps = 50
    config.sample_every_steps = 5_000
    config.sample_images = 32
    config.checkpoint_every_steps = 250
    config.evaluation.num_samples = 96
    config.evaluation.batch_size = 96
    return config
