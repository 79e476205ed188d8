"""The settings of every experiment's config, with defaults that a config file may change."""

import math
from collections.abc import Mapping
from types import MappingProxyType

from ml_collections import ConfigDict

from diffjax import choices, lookup
from diffjax.choices import Table, copy
from diffjax.data import Augment
from diffjax.models.low_rank import LoraLayers
from diffjax.process.precond import Meaning
from diffjax.sampling.sample import Recipe
from diffjax.spec import spec
from diffjax.training.nonfinite import NonFinite
from diffjax.wiring import traits_of

_EPOCHS, _FEWEST_STEPS = 2_000, 2_000


def suiting_steps(num_images: int, batch_size: int) -> int:
    """Training steps that suit a small set of images: each is seen 2,000 times.

    On CIFAR-10, DDPM sees each image 2,000 times (Ho et al. 2020) and EDM 4,000 times (Karras et
    al. 2022); far beyond that, a network memorises its images. Fewer than 2,000 steps train
    nothing.

    Example:
        >>> suiting_steps(270, batch_size=64), suiting_steps(20, batch_size=64)
        (8500, 2000)
    """
    steps = math.ceil(_EPOCHS * num_images / batch_size / 100) * 100
    return max(_FEWEST_STEPS, steps)


def seen_too_often(num_steps: int, num_images: int, batch_size: int) -> bool:
    """Whether a run sees each image over 4,000 times, in more steps than the fewest."""
    often = num_steps * batch_size > 2 * _EPOCHS * num_images
    return often and num_steps > suiting_steps(num_images, batch_size)


def experiment(
    name: str,
    arguments: str,
    *,
    data: ConfigDict,
    extractor: ConfigDict,
    models: Table,
    model: str,
    models_of_targets: Mapping[str, str] = MappingProxyType({}),
    objective: str = "flow",
    optimizer: ConfigDict | None = None,
    guidance_scale: float = 2.0,
    num_steps: int = 18,
    evaluated_steps: tuple[int, ...] = (5, 18),
) -> ConfigDict:
    """A config with every setting that training, sampling and evaluation read.

    Args:
        name: the name of the run folder; the choices of `arguments` are appended.
        arguments: the text after the config file's colon.
        data: the spec of a `DataSet`.
        extractor: the spec of an `Extractor`, for evaluation.
        models: the networks of this config, by name.
        model: the name of the default network.
        models_of_targets: the names of other default networks, by the target that they predict.
        objective: the name of the default objective.
        optimizer: the spec of the default optimizer, with a learning rate for this config; AdamW if
            it is None. Another one that `arguments` choose has the numbers of its paper.
        guidance_scale: the guidance scale of the samples of denoisers, and of networks that have
            the scale as an input. Samples of other few-step models have no guidance.
        num_steps: the number of steps of the samples of denoisers; few-step models take 2.
        evaluated_steps: numbers of steps that are evaluated too; of few-step models 1, 2 and 4.

    Returns:
        The config, which is not locked.

    Raises:
        UserError: an axis or a choice in `arguments` is unknown.
    """
    config = ConfigDict()
    config.name = name
    config.seed = 0
    config.num_steps = 10_000
    config.batch_size = 128
    config.accumulation_steps = 1  # parts of a batch, one after the other, for less memory
    config.data = data
    config.augment = spec(Augment)
    config.optimizer = optimizer or copy(choices.OPTIMIZERS["adamw"])
    names = lookup.set_axes(
        config,
        arguments,
        models,
        objective=objective,
        model=model,
        models_of_targets=models_of_targets,
    )
    traits = traits_of(config)
    by_ode = traits.meaning.serves(Meaning.POSTERIOR_MEAN)
    denoises = traits.meaning is Meaning.POSTERIOR_MEAN
    solvers = choices.SOLVERS_OF_PATHS if denoises else {}
    solver = solvers.get(names["path"], traits.solver)
    jumps = traits.meaning is Meaning.END_OF_FLOW
    grids = choices.GRIDS_OF_JUMPS if jumps else choices.GRIDS_OF_PATHS
    scale = guidance_scale if denoises else 1.0
    if traits.scales:
        scale = min(max(guidance_scale, traits.scales[0]), traits.scales[1])
    config.condition_dropout = 0.1  # the share made null, for guidance; or {"part": share, …}
    config.init_from = ""  # weights to begin with: a run, FOLDER:ema-0.999 or a file; "" is fresh
    config.lora = spec(LoraLayers)  # low-rank changes that are trained alone; with rank 0 none
    config.trainable = ""  # patterns of parameters' paths, as "*attention*"; "" is all
    config.nonfinite = spec(NonFinite)
    config.ema_decays = (0.999,)
    config.ema_lengths = ()  # of power-function averages, as (0.05, 0.1): experiments.average
    config.ema_rampup_ratio = 0.0  # how averages begin: 0.05 as in EDM, 0 as in DDPM
    config.weights = "ema-0.999"  # used for sampling and evaluation
    config.teacher = "ema"  # what objectives may learn from: an average, live, or a run's folder
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1})
    config.sampling = spec(
        Recipe,
        solver=copy(choices.SOLVERS[solver]),
        grid=copy(choices.GRIDS[grids.get(names["path"], "uniform")]),
        num_steps=num_steps if denoises else 2,
        guidance_scale=scale,
        guidance=lookup.guidance_called("cfg"),
        against=lookup.against_called("embedded" if traits.scales else "null"),
    )
    config.best_by = ""  # the best checkpoint is kept by this metric, as "samples/accuracy"
    config.patience_evaluations = 0  # training ends after so many without a better one; 0: never
    config.log_every_steps = 100
    config.snapshot_every_steps = 1_000  # of the averages in ema_lengths
    config.sample_every_steps = 1_000
    config.sample_images = 64  # the largest number of samples in a picture
    config.sample_prompts = ()  # texts of them, as --labels has; () is all in turn, or of the data
    config.checkpoint_every_steps = 1_000
    config.checkpoints_to_keep = 3
    config.checkpoints_kept_every_steps = 100_000
    config.evaluation = ConfigDict(
        {
            "extractor": extractor,
            "extractors": (),  # further extractors, for the recipe in `sampling` alone
            "num_samples": 1_000,
            "labels": "data",  # its proportions; or "balanced", or labels in turn, such as "3,7"
            "prompts": "",  # "@FILE" of texts that samples show in turn, or one, for labels
            "batch_size": 500,
            "solvers": tuple(dict.fromkeys(("ddim", solver) if by_ode else (solver,))),
            "grids": (),  # empty: the grid of `sampling`
            "num_steps": evaluated_steps if denoises else (1, 2, 4),
            "guidance_scales": (),  # empty: the scale of `sampling`
            "weights": (),  # empty: `config.weights`
            "seeds": (),  # empty: `seed`
            "seed": 0,
            "likelihood": (),  # methods for bits per dimension: "ode", "vlb", "discrete_vlb"
        }
    )
    return config
