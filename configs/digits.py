"""Handwritten digits (8x8, in scikit-learn): a class-conditional generator in minutes on a CPU.

    python -m experiments.train --config=configs/digits.py
    python -m experiments.train --config=configs/digits.py:objective=ddpm,model=unet
"""

from ml_collections import ConfigDict

from diffjax import choices
from diffjax.data import Augment, digits
from diffjax.evaluation import features
from diffjax.models.dit import DiT
from diffjax.models.unet import UNet
from diffjax.sampling.sample import Recipe
from diffjax.spec import spec
from diffjax.training import optimizer

MODELS = {
    "dit": spec(DiT, patch_size=2, hidden_size=128, depth=4, num_heads=4),
    "unet": spec(
        UNet,
        channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        head_channels=32,
    ),
}


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model (dit, unet)."""
    config = ConfigDict()
    config.name = "digits"
    config.seed = 0
    config.num_steps = 4_000
    config.batch_size = 128
    config.data = spec(digits)
    config.augment = spec(Augment)
    choices.set_axes(config, arguments, MODELS, model="dit")
    config.label_dropout = 0.1
    config.optimizer = spec(
        optimizer.adamw, learning_rate=1e-3, warmup_steps=200, final_fraction=0.02
    )
    config.ema_decays = (0.99, 0.999)
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.sampling = spec(
        Recipe,
        solver=choices.copy(choices.SOLVERS["heun"]),
        grid=choices.copy(choices.GRIDS["uniform"]),
        num_steps=18,
        guidance_scale=2.0,
    )
    config.weights = "ema-0.999"
    config.log_every_steps = 50
    config.sample_every_steps = 500
    config.checkpoint_every_steps = 1_000
    config.checkpoints_to_keep = 3
    config.checkpoints_kept_every_steps = 100_000
    config.evaluation = ConfigDict(
        {
            "extractor": spec(features.classifier_features, name="digits"),
            "num_samples": 1_000,
            "batch_size": 500,
            "solvers": ("ddim", "heun"),
            "num_steps": (5, 18),
            "seed": 0,
        }
    )
    return config
