r"""Fashion-MNIST (28x28 grey, ten kinds of clothing).

    python -m experiments.train --config=configs/fashion_mnist.py --config.data.path=FOLDER
    python -m experiments.train --config=configs/fashion_mnist.py:model=unet,objective=ddpm \
        --config.data.path=FOLDER

FOLDER holds the four idx files; `docs/data.md` explains where to get them. The first takes 58 min
on two cores of an Intel Xeon beside other work, and reaches 90.6 % accuracy and a Fréchet distance
of 3.0 (floor 0.85) at 34 network evaluations per sample; with a guidance of 2, 93.3 % and 3.6. What
else was tried is in docs/recipes.md.
"""

from ml_collections import ConfigDict

from diffjax import choices
from diffjax.data import fashion_mnist
from diffjax.defaults import experiment
from diffjax.evaluation.extractors.features import classifier_features
from diffjax.models import DiT
from diffjax.optimizers.descent import descent
from diffjax.optimizers.schedules import Cosine
from diffjax.spec import spec

LARGER_DIT = spec(DiT, patch_size=4, hidden_size=192, depth=6, num_heads=6)


def get_config(arguments: str = "") -> ConfigDict:
    """Axes: objective, path, target, weight, times, model, optimizer, schedule."""
    config = experiment(
        "fashion_mnist",
        arguments,
        data=spec(fashion_mnist),
        extractor=spec(classifier_features, name="fashion_mnist"),
        models={**choices.MODELS_28X28, "dit": LARGER_DIT},
        model="dit",
        models_of_targets=choices.MODELS_OF_TARGETS,
        objective="sd3",
        optimizer=spec(descent, learning_rate=1.5e-3, schedule=spec(Cosine, final_fraction=0.02)),
        guidance_scale=1.5,
        num_steps=9,
        evaluated_steps=(5, 9),
    )
    config.num_steps = 3_500
    config.batch_size = 64
    config.ema_decays = (0.99, 0.999)
    config.log_every_steps = 50
    config.sample_every_steps = 500
    config.checkpoint_every_steps = 500
    return config
