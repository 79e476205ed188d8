"""Digits by reflow: paths so straight that a step or two will do (docs/bridges.md).

python -m experiments.reflow --workdir=runs/digits --num_pairs=20000 --out=pairs.npz
python -m experiments.train --config=configs/digits_reflow.py --config.data.path=pairs.npz
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
        "digits_reflow",
        arguments,
        data=spec(pairs, dataset=spec(digits)),
        extractor=spec(classifier_features, name="digits"),
        models=choices.MODELS_8X8,
        model="dit",
        objective="reflow",
        optimizer=spec(descent, learning_rate=2e-3, schedule=spec(Cosine, final_fraction=0.02)),
    )
    config.num_steps = 2_400
    config.condition_dropout = 0.0  # the pairs hold the teacher's guidance already
    config.ema_decays = (0.99, 0.999)
    config.sampling.solver = choices.copy(choices.SOLVERS["euler"])
    config.sampling.num_steps = 2
    config.sampling.guidance_scale = 1.0
    config.log_every_steps = 50
    config.sample_every_steps = 400
    config.checkpoint_every_steps = 800
    config.evaluation.solvers = ("euler",)
    config.evaluation.num_steps = (1, 2, 5)
    return config
