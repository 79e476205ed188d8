"""The settings of an experiment, with their types and ranges.

`diffjax.defaults.experiment` makes them with their defaults. The parts of an experiment (data,
network, path, optimizer, …) declare the types and ranges of their own numbers (`diffjax.kinds`).
docs/settings.md lists all of them; the string below a setting here is its meaning there.
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
    """The features of distances, and the classifier of the accuracy if it has one."""
    extractors: tuple[Spec, ...]
    """Further ones, for the recipe of `sampling` alone."""
    num_samples: NumSamples
    """Samples of each recipe; published FIDs have 50,000."""
    labels: str
    """Of the samples: `data` (in its proportions), `balanced`, or labels in turn, as `3,7`."""
    prompts: str
    """`@FILE` of texts that the samples show in turn, or one text; empty is `labels`."""
    batch_size: AtLeastOne[int]
    """Samples and images at a time, over all devices."""
    solvers: tuple[str, ...]
    """Solvers by name; recipes are all combinations of these lists."""
    grids: tuple[str, ...]
    """Time grids by name; empty is that of `sampling`."""
    num_steps: tuple[NumSteps, ...]
    """Numbers of solver steps."""
    guidance_scales: tuple[float, ...]
    """Guidance scales; empty is that of `sampling`."""
    weights: tuple[str, ...]
    """Averages (EMA) or `live`; empty is `config.weights`."""
    seeds: tuple[Seed, ...]
    """Of the noise; empty is `seed`."""
    seed: Seed
    """Of the noise and of what is drawn by metrics."""
    likelihood: tuple[str, ...]
    """Methods for bits per dimension: `ode`, `vlb`, `discrete_vlb`; empty for none."""


class Mesh(TypedDict, total=False):
    """The number of devices on each axis of the mesh; -1 means all that are left."""

    data: int
    """Groups of devices that share the batch."""
    fsdp: int
    """Devices of a group, which share the batch and hold a part of the parameters each."""
    tensor: int
    """Devices that share heads and widths of one image."""
    sequence: int
    """Devices that share the tokens of one image."""


class Expected(TypedDict, total=False):
    """The data for which a config is written; plans use them, training checks them."""

    image_shape: tuple[int, int, int]
    """Height, width and channels of images or latents."""
    num_classes: int
    """Number of classes; 0 for none."""
    num_images: int
    """Number of training images."""
    condition: Spec
    """Kind of condition, where it is no class."""


class Settings(TypedDict):
    """All settings of an experiment's config."""

    name: str
    """Of the run's folder and page."""
    seed: Seed
    """Of parameters, order of the data, noise and times."""
    num_steps: AtLeastOne[int]
    """Training steps: updates of the parameters."""
    batch_size: AtLeastOne[int]
    """Images of a step, over all devices and parts."""
    accumulation_steps: AtLeastOne[int]
    """Gradient accumulation: parts of a batch, one after the other, for less memory."""
    data: Spec
    """The data set."""
    expected: NotRequired[Expected]
    """The data for which the config is written; plans use it, training checks it."""
    augment: Spec
    """Random changes of the training images."""
    path: Spec
    """From data to noise: alpha, sigma and the range of times (the noise schedule)."""
    precond: Spec
    """What the network predicts, its time or noise conditioning, and the scale of its input."""
    objective: Spec
    """The loss: its class, weight, density of times and coupling."""
    wrappers: tuple[Spec, ...]
    """Changes of the objective, the innermost first."""
    model: Spec
    """The network."""
    condition_dropout: Probability[float] | Mapping[str, Probability[float]]
    """Probability that a condition is made null, for guidance; or `{"part": probability}`."""
    init_from: str
    """Weights to begin with: a run, `FOLDER:ema-0.999`, or a file; empty is a fresh network."""
    trainable: str
    """Patterns of the parameters that are trained, as `*attention*`; empty is all."""
    lora: Spec
    """Low-rank changes (LoRA) that are trained alone; rank 0 for none."""
    optimizer: Spec
    """From gradients to updates, with the learning rate, its warm-up and schedule, and clipping."""
    nonfinite: Spec
    """What to do with a loss that is not finite."""
    ema_decays: tuple[Decay[float], ...]
    """Exponential moving averages (EMA) of the parameters, by decay: `ema-0.999`."""
    ema_rampup_ratio: NotNegative[float]
    """Largest half-life of those, over the steps made: 0.05 in EDM; 0 for the rule of DDPM."""
    ema_lengths: tuple[Length, ...]
    """Power-function averages (EDM2), by length: `power-0.05`."""
    weights: str
    """The average, or `live`, that samples and evaluations use."""
    teacher: str
    """What an objective may learn from: `ema`, an average, `live`, or a run's folder."""
    mesh: Mesh
    """Devices along each axis; -1 is all that are left."""
    sharding_rules: NotRequired[tuple[ShardingRule, ...] | None]
    """Which axes shard which parameters; none is `diffjax.training.sharding.RULES`."""
    sampling: Spec
    """The recipe of samples: solver, time grid, steps, guidance."""
    log_every_steps: AtLeastOne[int]
    """Steps between lines of `metrics.jsonl` and of the terminal."""
    snapshot_every_steps: AtLeastOne[int]
    """Steps between snapshots of the averages in `ema_lengths`."""
    sample_every_steps: AtLeastOne[int]
    """Steps between pictures of samples."""
    sample_images: AtLeastOne[int]
    """The largest number of samples in a picture."""
    sample_prompts: tuple[str, ...]
    """Texts of these samples, as `--labels` has them; empty is all labels in turn."""
    checkpoint_every_steps: AtLeastOne[int]
    """Steps between checkpoints."""
    checkpoints_to_keep: AtLeastOne[int]
    """The newest ones that are kept."""
    checkpoints_kept_every_steps: AtLeastOne[int]
    """Further ones that are kept for good: those of multiples of this."""
    evaluation: Evaluation
    """Metrics at the end of training and of `experiments.evaluate`."""
    evaluators: Spec
    """Metrics during training, by name."""
    best_by: str
    """The metric whose best checkpoint is kept, as `samples/accuracy`; empty for none."""
    patience_evaluations: NotNegative[int]
    """Early stopping: after so many values of `best_by` in a row that are no better; 0 is never."""
    trackers: Spec
    """Where numbers and pictures go besides the folder (W&B, MLflow, Aim), by name."""


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
