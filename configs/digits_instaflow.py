"""Digits in one step, InstaFlow's second stage: the pairs of a reflowed model (docs/objectives.md).

python -m experiments.reflow --workdir=runs/reflow --num_pairs=20000 --num_steps=9 --out=pairs.npz
python -m experiments.train --config=configs/digits_instaflow.py --config.data.path=pairs.npz \
    --config.init_from=runs/reflow

runs/reflow is a run of configs/digits_reflow.py, whose data are pairs of a first model.
"""

from ml_collections import ConfigDict

from diffjax import choices
from diffjax.data import digits, pairs
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import classifier_features
from diffjax.optimizers.descent import descent
from diffjax.optimizers.schedules import Cosine
from diffjax.spec import spec


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule."""
    config = experiment(
        "digits_instaflow",
        arguments,
        data=spec(pairs, dataset=spec(digits)),
        extractor=spec(classifier_features, name="digits"),
        models=choices.MODELS_8X8,
        model="dit",
        objective="instaflow",
        optimizer=spec(descent, learning_rate=1e-3, schedule=spec(Cosine, final_fraction=0.02)),
    )
    config.num_steps = 1_200
    config.condition_dropout = 0.0  # the pairs hold the teacher's guidance already
    config.ema_decays = (0.99, 0.999)
    config.log_every_steps = 50
    config.sample_every_steps = 400
    config.checkpoint_every_steps = 400
    return config
