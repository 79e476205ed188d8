"""Tunes a published pipeline of Stable Diffusion, SD 3 or Flux on pictures with captions.

    python -m experiments.train --config=configs/finetune.py --config.init_from=FOLDER \
        --config.data.path=PICTURES

FOLDER is one that diffusers saved. PICTURES has NAME.png and NAME.txt, or metadata.jsonl. Objective
and recipe are those of the folder: `configs/finetune.py:target=v` trains its network to another
target. docs/fine_tuning.md explains the settings.
"""

from ml_collections import ConfigDict

from diffjax.optimizers.descent import descent
from diffjax.optimizers.schedules import Constant
from diffjax.spec import spec
from diffjax.tuning.config import tuning_config


def get_config(arguments: str = "", *, init_from: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, optimizer, schedule."""
    config = tuning_config(init_from, arguments)
    if "optimizer" not in arguments:
        config.optimizer = spec(
            descent, learning_rate=1e-5, warmup_steps=100, schedule=spec(Constant)
        )
    config.num_steps = 1_000
    config.batch_size = 4
    config.log_every_steps = 10
    config.sample_every_steps = 250
    config.sample_images = 4
    config.checkpoint_every_steps = 250
    config.checkpoints_to_keep = 1
    config.evaluation.num_samples = 16
    config.evaluation.batch_size = 4
    config.evaluation.solvers = ()
    config.evaluation.num_steps = ()
    return config
