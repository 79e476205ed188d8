"""The settings of an experiment beside its parts, each with what it may be.

`diffjax.experiment.experiment` makes them with their defaults; the parts (data, network, path,
optimizer, …) declare what their own numbers may be (`diffjax.kinds`).
"""

from typing import Annotated, Any, TypedDict

from ml_collections import ConfigDict

from diffjax.errors import UserError
from diffjax.kinds import AtLeastOne, Decay, Interval, Probability, complaint

Spec = Any
"""What `diffjax.spec.build` turns into a part, and checks."""
Seed = Annotated[int, Interval("[0, 4294967295]")]
"""Of JAX's 32 bits: 2³² would be 0 again."""


class Evaluation(TypedDict):
    """What a run is judged by."""

    extractor: Spec
    extractors: tuple[Spec, ...]
    num_samples: Annotated[int, Interval("[3, inf)")]  # A covariance needs that many.
    labels: str
    batch_size: AtLeastOne[int]
    solvers: tuple[str, ...]
    grids: tuple[str, ...]
    num_steps: tuple[AtLeastOne[int], ...]
    guidance_scales: tuple[float, ...]
    weights: tuple[str, ...]
    seeds: tuple[Seed, ...]
    seed: Seed
    likelihood: tuple[str, ...]


class Settings(TypedDict):
    """What every experiment's config has, but for its parts."""

    name: str
    seed: Seed
    num_steps: AtLeastOne[int]
    batch_size: AtLeastOne[int]
    accumulation_steps: AtLeastOne[int]
    wrappers: tuple[Spec, ...]
    label_dropout: Probability[float]
    ema_decays: tuple[Decay[float], ...]
    weights: str
    log_every_steps: AtLeastOne[int]
    sample_every_steps: AtLeastOne[int]
    checkpoint_every_steps: AtLeastOne[int]
    checkpoints_to_keep: AtLeastOne[int]
    checkpoints_kept_every_steps: AtLeastOne[int]
    evaluation: Evaluation


def check_settings(config: ConfigDict) -> None:
    """Refuses a setting of another kind, or a number out of its range.

    What a config lacks, as older ones do, is passed over.

    Raises:
        UserError: the first of them, by its name.

    Example:
        >>> check_settings(ConfigDict({"label_dropout": 1.5}))
        Traceback (most recent call last):
        ...
        diffjax.errors.UserError: config.label_dropout=1.5 must be at least 0 and at most 1
    """
    wrong = complaint("config", config, Settings)
    if wrong:
        raise UserError(wrong)
