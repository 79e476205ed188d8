"""From names to specs: looks up the named choices of `diffjax.choices`, for configs and flags."""

import functools
import re
from collections.abc import Mapping
from types import MappingProxyType

from ml_collections import ConfigDict

from diffjax import choices, config_files
from diffjax.codecs import Codec
from diffjax.data.latents import latents_in
from diffjax.errors import UserError, nearest
from diffjax.process import precond
from diffjax.sampling.solvers import Solver
from diffjax.spec import TARGET, build, choose, parse_arguments, spec, spec_at
from diffjax.text import FolderEncoder

# In the order of a config's name.
_AXES = (
    *("objective", *choices.AXES, "wrappers", "model", *choices.TRAINING_AXES),
    *("derivative", "latents", "codec"),
)


def chosen_on_axes(arguments: str) -> dict[str, str]:
    """The choices that a text names, by axis; of other axes the defaults are taken.

    Raises:
        UserError: an axis is unknown or occurs twice.

    Example:
        >>> chosen_on_axes("objective=ddpm,target=v")
        {'objective': 'ddpm', 'target': 'v'}
    """
    return parse_arguments(arguments, *_AXES, "evaluators", "trackers")


def set_axes(
    config: ConfigDict,
    arguments: str,
    models: choices.Table,
    *,
    objective: str = "flow",
    model: str,
    models_of_targets: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """Sets the parts of a config that its arguments choose, and completes its name.

    Sets `config.path`, `.precond`, `.objective`, `.wrappers`, `.model`, `.optimizer`,
    `.evaluators`, `.trackers`, and the codec of a config of latents; `latents=FOLDER` takes the
    latents in a folder (`experiments.encode_latents`) in the place of the config's images. Choices
    that are not defaults are appended to `config.name`: each choice has its own run folder.
    Evaluators and trackers are not, because they change nothing of what is trained. A part of one's
    own is `module:name` in the place of a name, as `weight=my_idea:Bump`.

    Args:
        config: a config with at least a `name`; `optimizer` is its own, AdamW if it has none.
        arguments: the text after the config file's colon, such as `objective=ddpm,target=v`.
        models: the networks of this config, by name.
        objective: the name of the default objective.
        model: the name of the default network.
        models_of_targets: the names of other default networks, by the target that they predict.

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
    chosen = chosen_on_axes(arguments)
    names: Mapping[str, str] = choose(
        choices.OBJECTIVES, chosen.get("objective", objective), "objective"
    )
    parts = {
        axis: part_called(table, chosen.get(axis, names[axis]), axis)
        for axis, table in choices.AXES.items()
    }
    config.path = parts["path"]
    config.precond = spec(
        precond.Precond, **{name: parts[name] for name in ("target", "noise_label", "input_scale")}
    )
    config.objective = parts["loss"]
    for name in ("weight", "times", "uniforms", "coupling"):
        config.objective[name] = parts[name]
    if "derivative" in chosen:
        derivative = choices.copy(choose(choices.DERIVATIVES, chosen["derivative"], "derivative"))
        _with_derivative(config.objective, chosen["derivative"]).derivative = derivative
    config.wrappers = tuple(
        part_called(choices.WRAPPERS, name, "wrapper")
        for name in joined(chosen.get("wrappers", names["wrappers"]))
    )
    model = models_of_targets.get(chosen.get("target", names["target"]), model)
    config.model = part_called(models, chosen.get("model", model), "model")
    if "latents" in chosen:
        config.data = latents_in(chosen["latents"])
    if "codec" in chosen:
        if "codec" not in config.get("data", {}):
            raise UserError(f"codec={chosen['codec']}: the data of {config.name} are no latents")
        config.data.codec = choices.copy(choose(choices.CODECS, chosen["codec"], "codec"))
        config.data.scale = 1.0  # a config's scale is that of latents without a codec
    own = config.get("optimizer") or choices.copy(choices.OPTIMIZERS["adamw"])
    config.optimizer = optimizer_chosen(own, chosen)
    for group, table in (("evaluators", choices.EVALUATORS), ("trackers", choices.TRACKERS)):
        config[group] = ConfigDict(
            {
                name: spec_at(name if ":" in name else choose(table, name, group.removesuffix("s")))
                for name in joined(chosen.get(group, ""))
            }
        )
    defaults = {"objective": objective, "model": model, "derivative": "exact"}
    defaults |= {**names, **_names_of(own)}
    # With "/", the name DiT-S/2 would make a subfolder.
    suffix = [
        re.sub("[/:]", "-", chosen[axis])
        for axis in _AXES
        if chosen.get(axis, defaults.get(axis)) != defaults.get(axis)
    ]
    config.name = "-".join([config.name, *suffix])
    return {axis: chosen.get(axis, names[axis]) for axis in (*choices.AXES, "wrappers")}


def part_called(table: choices.Table, name: str, axis: str) -> ConfigDict:
    """The spec of a part: the row of a table, or `module:name` of one's own with its defaults.

    Raises:
        UserError: the table has no such row, or there is no such module or callable in it.

    Example:
        >>> part_called(choices.WEIGHTS, "diffjax.process.weights:MinSNR", "weight").gamma
        5.0
    """
    return spec_at(name) if ":" in name else choices.copy(choose(table, name, axis))


def _with_derivative(loss: ConfigDict, name: str) -> ConfigDict:
    """The loss, or the part of it, that has a derivative of the network.

    Raises:
        UserError: it has none.
    """
    for part in (loss, loss.get("rule", {})):
        if "derivative" in part:
            return part
    raise UserError(
        f"derivative={name}: the loss {loss[TARGET].rpartition(':')[2]} has no derivative of the "
        "network; leave it out, or take one that has, as objective=mean_flow"
    )


def optimizer_chosen(own: ConfigDict, chosen: Mapping[str, str]) -> ConfigDict:
    """A config's optimizer, or the chosen one with the chosen schedule.

    Warm-up and schedule go with a run's length and data, so that another optimizer keeps those of
    the config, unless a schedule comes with it (`choices.SCHEDULES_OF_OPTIMIZERS`). Its other
    numbers are those of its row. A choice that the config makes already changes nothing.

    Args:
        own: the config's optimizer.
        chosen: names by axis, with or without `optimizer` and `schedule`.

    Raises:
        UserError: an unknown name, or a schedule for an optimizer that takes none.

    Example:
        >>> own = choices.copy(choices.OPTIMIZERS["adamw"])
        >>> own.learning_rate, own.warmup_steps = 5e-4, 7
        >>> lion = optimizer_chosen(own, {"optimizer": "lion", "schedule": "cosine"})
        >>> lion.learning_rate, lion.warmup_steps, lion.schedule.final_fraction
        (0.0001, 7, 0.0)
    """
    names = _names_of(own)
    config = choices.copy(own)
    name, default = chosen.get("optimizer"), None
    if name and name != names.get("optimizer"):
        config = part_called(choices.OPTIMIZERS, name, "optimizer")
        for kept in [key for key in ("warmup_steps", "schedule") if key in own]:
            config[kept] = own[kept]
        default = choices.SCHEDULES_OF_OPTIMIZERS.get(name)
    schedule = chosen.get("schedule", default)
    if schedule and schedule != names.get("schedule"):
        row = part_called(choices.SCHEDULES, schedule, "schedule")
        if "schedule" not in config:
            raise UserError(f"schedule={schedule}: {config[TARGET]} takes no schedule")
        config.schedule = row
    return config


def _names_of(optimizer: ConfigDict) -> dict[str, str]:
    """The rows of the tables that an optimizer and its schedule are, as far as they are any."""
    parts = {"optimizer": optimizer, "schedule": optimizer.get("schedule", {})}
    return {
        axis: name
        for axis, part in parts.items()
        for name, row in choices.TRAINING_AXES[axis].items()
        if _callables(row) == _callables(part)
    }


def _callables(part: ConfigDict) -> tuple[str | None, str | None]:
    """Those of an optimizer and its rule, or of a schedule."""
    return part.get(TARGET), part.get("rule", {}).get(TARGET)


def joined(names: str) -> list[str]:
    """Splits names that are joined by "+"; of wrappers, the innermost is first.

    Example:
        >>> joined("adaptive+uncertainty"), joined("none"), joined("")
        (['adaptive', 'uncertainty'], [], [])
    """
    return [name for name in names.split("+") if name not in ("none", "")]


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

    After weights and a `+` comes the condition that they have, if it is another one.

    Raises:
        UserError: the name is unknown, or its argument is not valid.

    Example:
        >>> against_called("label:3").text, against_called("weights:ema-0.99").weights
        ('3', 'ema-0.99')
        >>> both = against_called("weights:runs/small+prompt:a+b")
        >>> both.weights, both.condition.text
        ('runs/small', 'a+b')
    """
    joined = re.fullmatch(r"(weights:.*?)\+((?:null|label|prompt)(?::.*)?)", text, re.DOTALL)
    if joined:
        row = against_called(joined[1])
        row.condition = against_called(joined[2])
        return row
    name, colon, value = text.partition(":")
    row = choices.copy(choose(choices.AGAINST, name, "against"))
    takes = [key for key in row if key != TARGET and isinstance(row[key], str)]
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


def codec_called(text: str) -> Codec:
    """The codec that a name and settings describe.

    Raises:
        UserError: no codec has this name, or it has no such setting.

    Example:
        >>> codec_called("space_to_depth:block=4")
        SpaceToDepth(block=4)
    """
    name, _, settings = text.partition(":")
    row = choose(choices.CODECS, name, "codec")
    return build(_with_settings(row, settings, f"codec {name}"), Codec, "codec")


def encoder_called(text: str) -> FolderEncoder:
    """The text encoder in a folder, with settings.

    Raises:
        UserError: it has no such setting.

    Example:
        >>> encoder_called("minilm:length=32,layer=-2").length
        32
    """
    folder, _, settings = text.partition(":")
    row = _with_settings(spec(FolderEncoder, folder=folder), settings, "text encoder")
    return build(row, FolderEncoder, "text")


def _with_settings(row: ConfigDict, settings: str, what: str) -> ConfigDict:
    """A copy of a spec with `setting=value,…`."""
    config = ConfigDict({"row": choices.copy(row)})
    known = [key for key in config.row if key != TARGET]
    for key in (pair.partition("=")[0] for pair in filter(None, settings.split(","))):
        if key not in known:
            raise UserError(f"the {what} has no setting {key!r}; {nearest(key, known)}")
    chosen = parse_arguments(settings, *known)
    config_files.override(config, {f"config.row.{key}": x for key, x in chosen.items()})
    return config.row
