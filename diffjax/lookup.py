"""From names to specs: looks up the named choices of `diffjax.choices`, for configs and flags."""

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
    """Sets the parts of a config that its arguments choose, and completes its name.

    Sets `config.path`, `.precond`, `.objective`, `.wrappers` and `.model`. The choices that are not
    defaults are appended to `config.name`, so that each choice has its own run folder.

    Args:
        config: a config with at least a `name`.
        arguments: the text after the config file's colon, such as `objective=ddpm,target=v`.
        models: the networks of this config, by name.
        objective: the name of the default objective.
        model: the name of the default network.

    Returns:
        The name of the choice on each axis.

    Raises:
        UserError: an axis or a choice is unknown; the nearest known one is in the message.

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
    # With "/", the name DiT-S/2 would make a subfolder.
    suffix = [
        chosen[axis].replace("/", "-")
        for axis in ("objective", *choices.AXES, "wrappers", "model")
        if chosen.get(axis, defaults[axis]) != defaults[axis]
    ]
    config.name = "-".join([config.name, *suffix])
    return {axis: chosen.get(axis, names[axis]) for axis in (*choices.AXES, "wrappers")}


def joined(names: str) -> list[str]:
    """Splits names of wrappers that are joined by "+", the innermost first.

    Example:
        >>> joined("mean_flow+uncertainty"), joined("none")
        (['mean_flow', 'uncertainty'], [])
    """
    return [name for name in names.split("+") if name != "none"]


def solver_for(wrappers: str) -> str:
    """The name of the default solver for sampling, for names of wrappers that are joined by "+".

    Example:
        >>> solver_for("mean_flow+uncertainty"), solver_for("uncertainty")
        ('flow_map', 'heun')
    """
    table = choices.SOLVERS_OF_WRAPPERS
    return next((table[name] for name in joined(wrappers) if name in table), "heun")


def guidance_called(names: str) -> ConfigDict:
    """The spec of a guidance rule from names that are joined by "+", the innermost first.

    Raises:
        UserError: a name is unknown, or a part after the first does not wrap another rule.

    Example:
        >>> guidance_called("projected+limited").rule["_target_"]
        'diffjax.sampling.guidance:Projected'
    """
    first, *others = (
        choices.copy(choose(choices.GUIDANCE, name, "guidance")) for name in names.split("+")
    )
    for name, outer in zip(names.split("+")[1:], others, strict=True):
        if "rule" not in outer:
            raise UserError(f"guidance {name!r} does not wrap another: put it first in {names!r}")
        outer.rule = first
        first = outer
    return first


def against_called(text: str) -> ConfigDict:
    """The spec of guidance's second prediction, from a name and, after a colon, its argument.

    Raises:
        UserError: the name is unknown, or its argument is not valid.

    Example:
        >>> against_called("label:3").text, against_called("weights:ema-0.99").weights
        ('3', 'ema-0.99')
    """
    name, colon, value = text.partition(":")
    row = choices.copy(choose(choices.AGAINST, name, "against"))
    takes = [key for key in row if key != TARGET]
    if colon and not takes:
        raise UserError(f"against={text}: {name!r} takes nothing after a colon")
    if colon:
        row[takes[0]] = value
    return row


@functools.cache
def solver_called(name: str) -> Solver:
    """The solver of a name: the same object at each call, so that compiled programs are reused.

    Raises:
        UserError: the name is unknown; the nearest known one is in the message.
    """
    return build(choose(choices.SOLVERS, name, "solver"))
