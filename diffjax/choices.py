"""The choices that have names, as tables of specs.

A config's axes are looked up here: `--config=configs/digits.py:objective=ddpm,path=cosine`. To add
a choice, add a row; nothing else knows the names.
"""

from collections.abc import Mapping
from types import MappingProxyType

from ml_collections import ConfigDict

from diffjax.objectives.denoising import Denoising
from diffjax.process import paths, precond, targets, times, weights
from diffjax.sampling import grids, solvers
from diffjax.spec import choose, parse_arguments, spec

Table = Mapping[str, ConfigDict]

PATHS: Table = MappingProxyType(
    {
        "linear": spec(paths.Linear),
        "cosine": spec(paths.Cosine),
        "ddpm": spec(paths.LinearBeta),
    }
)
TARGETS: Table = MappingProxyType(
    {
        "noise": spec(targets.Noise),
        "clean": spec(targets.Clean),
        "v": spec(targets.V),
        "velocity": spec(targets.Velocity),
    }
)
WEIGHTS: Table = MappingProxyType(
    {
        "constant": spec(weights.Constant),
        "min_snr": spec(weights.MinSNR),
    }
)
TIMES: Table = MappingProxyType(
    {
        "uniform": spec(times.Uniform),
        "logit_normal": spec(times.LogitNormal),
    }
)
SOLVERS: Table = MappingProxyType(
    {
        "ddim": spec(solvers.ddim),
        "ddpm": spec(solvers.ddpm),
        "euler": spec(solvers.euler),
        "heun": spec(solvers.heun),
    }
)
GRIDS: Table = MappingProxyType(
    {
        "uniform": spec(grids.Power),
        "quadratic": spec(grids.Power, exponent=2.0),
        "log_snr": spec(grids.UniformLogSNR),
    }
)
# What a paper's name stands for on each axis.
OBJECTIVES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "ddpm": {"path": "ddpm", "target": "noise", "weight": "constant", "times": "uniform"},
        "flow": {"path": "linear", "target": "velocity", "weight": "constant", "times": "uniform"},
        "v": {"path": "cosine", "target": "v", "weight": "constant", "times": "uniform"},
    }
)
AXES: Mapping[str, Table] = MappingProxyType(
    {"path": PATHS, "target": TARGETS, "weight": WEIGHTS, "times": TIMES}
)


def set_axes(
    config: ConfigDict,
    arguments: str,
    models: Table,
    *,
    objective: str = "flow",
    model: str,
) -> None:
    """Fills the parts of a config that its arguments choose, and completes its name.

    Sets `config.path`, `.precond`, `.objective` and `.model`, and appends what was chosen to
    `config.name`, so that each choice has its own run folder.

    Args:
        config: with at least a `name`.
        arguments: what followed the config file's colon, as `objective=ddpm,target=v`.
        models: the networks that this config offers, by name.
        objective: the name of the default objective.
        model: the name of the default network.

    Raises:
        UserError: an unknown axis or choice, with the nearest known one.

    Example:
        >>> config = ConfigDict({"name": "toy"})
        >>> set_axes(config, "objective=ddpm,target=v", {"none": ConfigDict()}, model="none")
        >>> config.name, config.precond.target["_target_"]
        ('toy-ddpm-v', 'diffjax.process.targets:V')
    """
    chosen = parse_arguments(arguments, "objective", *AXES, "model")
    names: Mapping[str, str] = choose(OBJECTIVES, chosen.get("objective", objective), "objective")
    parts = {
        axis: choose(table, chosen.get(axis, names[axis]), axis) for axis, table in AXES.items()
    }
    config.path = copy(parts["path"])
    config.precond = spec(
        precond.Precond, target=copy(parts["target"]), noise_label=spec(precond.TimeLabel)
    )
    config.objective = spec(Denoising, weight=copy(parts["weight"]), times=copy(parts["times"]))
    config.model = copy(choose(models, chosen.get("model", model), "model"))
    defaults = {"objective": objective, "model": model, **names}
    # "/" would make a folder of DiT-S/2.
    suffix = [
        chosen[axis].replace("/", "-")
        for axis in ("objective", *AXES, "model")
        if chosen.get(axis, defaults[axis]) != defaults[axis]
    ]
    config.name = "-".join([config.name, *suffix])


def copy(row: ConfigDict) -> ConfigDict:
    """A row of a table to put into a config, where flags may change it."""
    return ConfigDict(row.to_dict())
