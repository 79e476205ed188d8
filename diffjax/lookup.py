"""From names to specs: what is chosen of the tables in `choices`, for a config or by a flag."""

import functools
from collections.abc import Mapping

from ml_collections import ConfigDict

from diffjax import choices
from diffjax.errors import UserError
from diffjax.process import precond
from diffjax.sampling.solvers import Solver
from diffjax.spec import TARGET, build, choose, parse_arguments, spec


def set_axes(
    config: ConfigDict,
    arguments: str,
    models: choices.Table,
    *,
    objective: str = "flow",
    model: str,
) -> dict[str, str]:
    """Fills the parts of a config that its arguments choose, and completes its name.

    Sets `config.path`, `.precond`, `.objective`, `.wrappers` and `.model`, and appends what was
    chosen to `config.name`, so that each choice has its own run folder.

    Args:
        config: with at least a `name`.
        arguments: what followed the config file's colon, as `objective=ddpm,target=v`.
        models: the networks that this config offers, by name.
        objective: the name of the default objective.
        model: the name of the default network.

    Returns:
        The name of the choice on each axis.

    Raises:
        UserError: an unknown axis or choice, with the nearest known one.

    Example:
        >>> config = ConfigDict({"name": "toy"})
        >>> names = set_axes(config, "objective=ddpm,target=v", {"": ConfigDict()}, model="")
        >>> names["path"], names["target"]
        ('ddpm', 'v')
        >>> config.name, config.precond.target["_target_"]
        ('toy-ddpm-v', 'diffjax.process.targets:V')
    """
    chosen = parse_arguments(arguments, "objective", *choices.AXES, "wrappers", "model")
    names: Mapping[str, str] = choose(
        choices.OBJECTIVES, chosen.get("objective", objective), "objective"
    )
    parts = {
        axis: choices.copy(choose(table, chosen.get(axis, names[axis]), axis))
        for axis, table in choices.AXES.items()
    }
    config.path = parts["path"]
    config.precond = spec(
        precond.Precond, **{name: parts[name] for name in ("target", "noise_label", "input_scale")}
    )
    config.objective = parts["bridge"]
    for name in ("weight", "times", "uniforms", "coupling"):
        config.objective[name] = parts[name]
    config.wrappers = tuple(
        choices.copy(choose(choices.WRAPPERS, name, "wrapper"))
        for name in joined(chosen.get("wrappers", names["wrappers"]))
    )
    config.model = choices.copy(choose(models, chosen.get("model", model), "model"))
    defaults = {"objective": objective, "model": model, **names}
    # "/" would make a folder of DiT-S/2.
    suffix = [
        chosen[axis].replace("/", "-")
        for axis in ("objective", *choices.AXES, "wrappers", "model")
        if chosen.get(axis, defaults[axis]) != defaults[axis]
    ]
    config.name = "-".join([config.name, *suffix])
    return {axis: chosen.get(axis, names[axis]) for axis in (*choices.AXES, "wrappers")}


def joined(names: str) -> list[str]:
    """The names of wrappers that "+" joins, the innermost first.

    Example:
        >>> joined("mean_flow+uncertainty"), joined("none")
        (['mean_flow', 'uncertainty'], [])
    """
    return [name for name in names.split("+") if name != "none"]


def solver_for(wrappers: str) -> str:
    """The name of the solver that samples are drawn by by default, from names of wrappers.

    Example:
        >>> solver_for("mean_flow+uncertainty"), solver_for("uncertainty")
        ('flow_map', 'heun')
    """
    table = choices.SOLVERS_OF_WRAPPERS
    return next((table[name] for name in joined(wrappers) if name in table), "heun")


def guidance_called(names: str) -> ConfigDict:
    """The spec of a guidance by the names of its parts, joined by "+", the innermost first.

    Raises:
        UserError: an unknown name, or a part after the first that is nothing around another.

    Example:
        >>> guidance_called("projected+limited").rule["_target_"]
        'diffjax.sampling.guidance:Projected'
    """
    first, *others = (
        choices.copy(choose(choices.GUIDANCE, name, "guidance")) for name in names.split("+")
    )
    for name, outer in zip(names.split("+")[1:], others, strict=True):
        if "rule" not in outer:
            raise UserError(f"guidance {name!r} goes around no other: put it first in {names!r}")
        outer.rule = first
        first = outer
    return first


def against_called(text: str) -> ConfigDict:
    """The spec of guidance's second prediction: a name, and after a colon its argument.

    Raises:
        UserError: an unknown name, or an argument that it doesn't take.

    Example:
        >>> against_called("label:3").label, against_called("weights:ema-0.99").weights
        (3, 'ema-0.99')
    """
    name, colon, value = text.partition(":")
    row = choices.copy(choose(choices.AGAINST, name, "against"))
    takes = [key for key in row if key != TARGET]
    if colon and not takes:
        raise UserError(f"against={text}: {name!r} takes nothing after a colon")
    if colon and isinstance(row[takes[0]], int) and not value.isdigit():
        raise UserError(f"against={text}: {name!r} takes a number after the colon")
    if colon:
        row[takes[0]] = type(row[takes[0]])(value)
    return row


@functools.cache
def solver_called(name: str) -> Solver:
    """A solver by name: the same object each time, for which compiled programs are kept.

    Raises:
        UserError: an unknown name.
    """
    return build(choose(choices.SOLVERS, name, "solver"))
