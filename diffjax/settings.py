"""The settings of an experiment, with their types and ranges.

`diffjax.defaults.experiment` makes them with their defaults. The parts of an experiment (data,
network, path, optimizer, …) declare the types and ranges of their own numbers (`diffjax.kinds`).
"""

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, NotRequired, TypedDict, is_typeddict

import numpy as np
from ml_collections import ConfigDict

from diffjax.errors import UserError, nearest
from diffjax.kinds import AtLeastOne, Decay, NotNegative, NumSteps, Probability, Range, complaint

Spec = Any
"""The spec of a part, or several by name, which `diffjax.spec.build` checks and builds."""
Seed = Annotated[int, Range("[0, 4294967295]")]
"""Of JAX's 32 bits: 2³² would be 0 again."""
NumSamples = Annotated[int, Range("[3, inf)")]
"""A covariance needs three."""
Length = Annotated[float, Range("(0, 0.2886]")]
"""The relative width of a power-function average (`diffjax.training.averages`)."""
LARGEST = 2**31 - 1
"""The largest whole number: without 64-bit numbers JAX takes the seeds 1 and 2³² + 1 for one."""
ShardingRule = tuple[str, tuple[str | tuple[str, ...] | None, ...]]


class Evaluation(TypedDict):
    """The settings of evaluation: metrics, samples and recipes."""

    extractor: Spec
    extractors: tuple[Spec, ...]
    num_samples: NumSamples
    labels: str
    prompts: str
    batch_size: AtLeastOne[int]
    solvers: tuple[str, ...]
    grids: tuple[str, ...]
    num_steps: tuple[NumSteps, ...]
    guidance_scales: tuple[float, ...]
    weights: tuple[str, ...]
    seeds: tuple[Seed, ...]
    seed: Seed
    likelihood: tuple[str, ...]


class Mesh(TypedDict, total=False):
    """The number of devices on each axis of the mesh; -1 means all that are left."""

    data: int
    fsdp: int
    tensor: int
    sequence: int


class Expected(TypedDict, total=False):
    """The data for which a config is written; plans use them, training checks them."""

    image_shape: tuple[int, int, int]
    num_classes: int
    num_images: int
    condition: Spec


class Settings(TypedDict):
    """All settings of an experiment's config."""

    name: str
    seed: Seed
    num_steps: AtLeastOne[int]
    batch_size: AtLeastOne[int]
    accumulation_steps: AtLeastOne[int]
    data: Spec
    expected: NotRequired[Expected]
    augment: Spec
    path: Spec
    precond: Spec
    objective: Spec
    wrappers: tuple[Spec, ...]
    model: Spec
    condition_dropout: Probability[float] | Mapping[str, Probability[float]]
    init_from: str
    trainable: str
    lora: Spec
    optimizer: Spec
    nonfinite: Spec
    ema_decays: tuple[Decay[float], ...]
    ema_lengths: tuple[Length, ...]
    weights: str
    teacher: str
    mesh: Mesh
    sharding_rules: NotRequired[tuple[ShardingRule, ...] | None]
    sampling: Spec
    log_every_steps: AtLeastOne[int]
    snapshot_every_steps: AtLeastOne[int]
    sample_every_steps: AtLeastOne[int]
    sample_images: AtLeastOne[int]
    sample_prompts: tuple[str, ...]
    checkpoint_every_steps: AtLeastOne[int]
    checkpoints_to_keep: AtLeastOne[int]
    checkpoints_kept_every_steps: AtLeastOne[int]
    evaluation: Evaluation
    evaluators: Spec
    best_by: str
    trackers: Spec
    patience_evaluations: NotNegative[int]


def check_whole(what: str, value: Any, least: int) -> None:
    """Refuses a value that is not a whole number from `least` to 2³¹ − 1, as the flags do.

    Raises:
        UserError: it is not.

    Example:
        >>> check_whole("num_steps", 2.5, 1)
        Traceback (most recent call last):
        ...
        diffjax.errors.UserError: num_steps=2.5: it is a whole number from 1 to 2147483647
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not least <= value <= LARGEST:
        raise UserError(f"{what}={value!r}: it is a whole number from {least} to {LARGEST}")


def check_settings(config: ConfigDict) -> None:
    """Checks the types and ranges of a config's settings.

    Settings that the config lacks are left to `check_complete`.

    Raises:
        UserError: a setting has another type or is out of its range; the first one is named.

    Example:
        >>> check_settings(ConfigDict({"condition_dropout": 1.5}))
        Traceback (most recent call last):
        ...
        diffjax.errors.UserError: config.condition_dropout=1.5 must be at least 0 and at most 1
    """
    wrong = complaint("config", config, Settings)
    if wrong:
        raise UserError(wrong)


def check_names(config: ConfigDict, group: type = Settings, where: str = "config") -> None:
    """Checks that all settings of a config exist, so that a misspelt one is not ignored.

    Args:
        config: a group of settings.
        group: the settings of the group, with their annotations.
        where: the name of the group in errors.

    Raises:
        UserError: a setting does not exist; the nearest known one is in the message.

    Example:
        >>> check_names(ConfigDict({"num_stepps": 3}))
        Traceback (most recent call last):
        ...
        diffjax.errors.UserError: there is no setting config.num_stepps; did you mean 'num_steps'?
    """
    known = inspect.get_annotations(group)
    for name, value in config.items():
        if name not in known:
            raise UserError(f"there is no setting {where}.{name}; {nearest(name, known)}")
        if is_typeddict(known[name]) and hasattr(value, "keys"):
            check_names(value, known[name], f"{where}.{name}")


def check_complete(config: ConfigDict, group: Any = Settings, where: str = "config") -> None:
    """Refuses a config that lacks a setting which every config has, or has none for it yet.

    Args:
        config: a group of settings.
        group: what belongs to it.
        where: its name.

    Raises:
        UserError: the first that is missing.

    Example:
        >>> check_complete(ConfigDict({"name": "mine"}))
        Traceback (most recent call last):
        ...
        diffjax.errors.UserError: there is no config.seed: diffjax.defaults.experiment makes
        configs that have every setting
    """
    known = inspect.get_annotations(group)
    if "autoencoder" in config:
        raise UserError(
            f"{where} is that of an autoencoder: experiments.train_autoencoder trains one"
        )
    for name in known:
        if name in group.__required_keys__ and name not in config:
            raise UserError(
                f"there is no {where}.{name}: diffjax.defaults.experiment makes configs that "
                "have every setting"
            )
        if is_typeddict(known[name]) and hasattr(config[name], "keys"):
            check_complete(config[name], known[name], f"{where}.{name}")
