"""The settings of the training of an autoencoder, with defaults that a config file may change."""

from typing import Any, TypedDict

from ml_collections import ConfigDict

from diffjax.autoencoders.losses import Adversary, Reconstruction
from diffjax.data import Augment
from diffjax.errors import UserError, nearest
from diffjax.kinds import AtLeastOne, Decay, complaint
from diffjax.models.patchgan import PatchGAN
from diffjax.optimizers.adam import Adam
from diffjax.optimizers.descent import descent
from diffjax.settings import Mesh, Seed, Spec, check_names
from diffjax.spec import spec
from diffjax.training.averages import Averages
from diffjax.training.state import LIVE


class Settings(TypedDict):
    """All settings of the config of an autoencoder."""

    name: str
    seed: Seed
    num_steps: AtLeastOne[int]
    batch_size: AtLeastOne[int]
    data: Spec
    augment: Spec
    autoencoder: Spec
    loss: Spec
    adversary: Spec
    optimizer: Spec
    adversary_optimizer: Spec
    ema_decays: tuple[Decay[float], ...]
    weights: str
    mesh: Mesh
    log_every_steps: AtLeastOne[int]
    sample_every_steps: AtLeastOne[int]
    sample_images: AtLeastOne[int]
    checkpoint_every_steps: AtLeastOne[int]
    checkpoints_to_keep: AtLeastOne[int]


def autoencoder_experiment(name: str, *, data: ConfigDict, autoencoder: ConfigDict) -> ConfigDict:
    """A config with every setting of the training of an autoencoder.

    Args:
        name: the name of the run folder.
        data: the spec of a `DataSet` of images.
        autoencoder: the spec of a `diffjax.codecs.autoencoders.Autoencoder`.
    """
    config = ConfigDict()
    config.name = name
    config.seed = 0
    config.num_steps = 100_000
    config.batch_size = 16
    config.data = data
    config.augment = spec(Augment)
    config.autoencoder = autoencoder
    config.loss = spec(Reconstruction)
    config.adversary = spec(Adversary, network=spec(PatchGAN))
    # The loss is a sum over pixels, so no norm of a gradient is too large.
    rule = spec(Adam, b1=0.5, b2=0.9)
    optimizer = spec(descent, rule=rule, learning_rate=1e-4, clip_norm=float("inf"))
    config.optimizer = optimizer
    config.adversary_optimizer = ConfigDict(optimizer.to_dict())
    config.ema_decays = (0.999,)
    config.weights = "ema-0.999"  # measured, shown and written for others
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1})
    config.log_every_steps = 100
    config.sample_every_steps = 5_000  # pictures, and metrics of test images
    config.sample_images = 32
    config.checkpoint_every_steps = 5_000
    config.checkpoints_to_keep = 3
    return config


def check_config(config: ConfigDict) -> None:
    """Refuses settings that are unknown, missing or out of their range; nothing is built.

    Raises:
        UserError: the first of them.
    """
    known: Any = Settings.__annotations__
    if missing := [name for name in known if name not in config]:
        kind = "an autoencoder" if "autoencoder" not in config else "training"
        raise UserError(
            f"there is no config.{missing[0]}, so this is no config of {kind}: "
            "configs/autoencoder.py is one"
        )
    check_names(config, Settings)
    if wrong := complaint("config", config, Settings):
        raise UserError(wrong)
    kept = [LIVE, *Averages(config.ema_decays).names]
    if config.weights not in kept:
        raise UserError(
            f"config.weights={config.weights!r} are not kept; {nearest(config.weights, kept)}"
        )
