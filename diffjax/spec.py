"""Specs: configs as plain data that name callables and their hyper-parameters.

`spec` turns a callable and its hyper-parameters into a `ConfigDict`; `build` turns a spec into an
object. A spec is plain data: it can be printed, compared and saved as JSON, and a flag can override
each hyper-parameter.
"""

import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from diffjax.errors import UserError, nearest
from diffjax.kinds import complaint, with_fractions

TARGET = "_target_"
# The modules of diffjax that a saved config may name: the parts of an experiment. The others write
# files, download or start programs.
_VOCABULARY = (
    "autoencoders.losses",
    "autoencoders.perceptual",
    "codecs",
    "conditions",
    "data",
    "evaluation.extractors",
    "loop.trackers",
    "models",
    "objectives",
    "optimizers",
    "process",
    "runs.measuring.evaluators",
    "sampling",
    "text.combined",
    "text.encoders",
    "text.prompts",
    "training.nonfinite",
    "tuning.captioned",
    "tuning.prior",
)
# Flax adds these two fields to every module, always together; they are not hyper-parameters.
_FLAX_WIRING = ("parent", "name")


def spec(target: Callable[..., Any], /, **overrides: Any) -> ConfigDict:
    """Describes a call of `target` as data, with the values of all its defaults.

    Parameters of `target` with neither a default nor an override are left out: they are runtime
    arguments, which `build` takes.

    Args:
        target: a class or function that can be imported by its module and name.
        **overrides: hyper-parameters; the values may be specs.

    Returns:
        A `ConfigDict` with the location of `target` under `_target_`, and the hyper-parameters.

    Raises:
        UserError: `target` has no such parameter, or can't be imported by name.

    Example:
        >>> from diffjax.process import paths
        >>> config = spec(paths.Cosine, t_noise=0.99)
        >>> config["_target_"], config.t_noise
        ('diffjax.process.paths:Cosine', 0.99)
        >>> build(config).t_noise
        0.99
    """
    location = f"{target.__module__}:{target.__qualname__}"
    if "<" in location:
        raise UserError(f"{location} can't be imported by name: define it at a module's top level")
    parameters = _parameters(target)
    for name in overrides:
        _check_known(location, name, parameters)
    fields = {
        name: with_fractions(
            overrides[name] if name in overrides else as_spec(parameter.default),
            parameter.annotation,
        )
        for name, parameter in parameters.items()
        if name in overrides or parameter.default is not inspect.Parameter.empty
    }
    return ConfigDict({TARGET: location, **fields})


def as_spec(default: Any) -> Any:
    """The spec of a dataclass, or of those in a dict or tuple; others are returned as they are."""
    if isinstance(default, dict):
        return {name: as_spec(value) for name, value in default.items()}
    if type(default) is tuple:
        return tuple(map(as_spec, default))
    if not dataclasses.is_dataclass(default) or isinstance(default, type):
        return default
    fields = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    return spec(type(default), **{name: as_spec(value) for name, value in fields.items()})


def defaults(location: str) -> dict[str, Any]:
    """The spec of a callable with its defaults alone, as plain JSON.

    Example:
        >>> defaults("diffjax.process.paths:Cosine")["t_noise"]
        0.999
    """
    return _plain(spec_at(location))


def spec_at(location: str) -> ConfigDict:
    """The spec of a callable by its location, `module:name`, with the values of all its defaults.

    Example:
        >>> spec_at("diffjax.process.paths:Cosine").t_noise
        0.999
    """
    return spec(_locate(location))


def build(config: Any, declared: Any = Any, name: str = "", /, **runtime: Any) -> Any:
    """Builds the object that a spec describes; inner specs are built first.

    The values of a config are checked against the annotations of the callable (`diffjax.kinds`).
    Runtime arguments are not checked.

    Args:
        config: a spec. Tuples and dicts of specs are built element by element; anything else is
            returned as it is.
        declared: the annotation that the result has to match.
        name: the name of the config in errors; by default the location of its callable.
        **runtime: arguments of the outermost call that a config can't contain (a shared path, the
            number of classes).

    Returns:
        What the callable returns.

    Raises:
        UserError: a key is not a parameter of the callable, a runtime argument is missing, a value
            has another type or is out of range, or the callable does not exist; the nearest known
            name is in the message.

    Example:
        >>> from diffjax.process import paths
        >>> build(ConfigDict({"_target_": "diffjax.process.paths:Cosine", "t_noise": 1.5}))
        Traceback (most recent call last):
        ...
        diffjax.errors.UserError: diffjax.process.paths:Cosine.t_noise=1.5 must be above 0 and at
        most 1, like 0.999
    """
    if isinstance(config, (list, tuple)):
        built: Any = tuple(build(item, Any, f"{name}[{i}]") for i, item in enumerate(config))
    elif not isinstance(config, (ConfigDict, Mapping)):
        built = config
    elif TARGET in config:
        built = _call(config, name or str(config[TARGET]), runtime)
    else:
        built = {key: build(value, Any, f"{name}.{key}") for key, value in config.items()}
    wrong = complaint(name, built, declared)
    if wrong:
        raise UserError(f"{wrong}, or the spec of one" if built is config else wrong)
    return built


def check_arguments(function: Callable[..., Any], /, **given: Any) -> None:
    """Refuses arguments that are not what a function's annotations declare.

    Args:
        function: that they are for; of a dataclass, its fields.
        **given: some of its arguments, or all.

    Raises:
        UserError: the first of another kind or out of range.

    Example:
        >>> def halve(x: float) -> float:
        ...     return x / 2
        >>> check_arguments(halve, x="3")
        Traceback (most recent call last):
        ...
        diffjax.errors.UserError: x='3' must be a number
    """
    declared = inspect.get_annotations(function)
    for name, value in given.items():
        wrong = complaint(name, value, declared[name])
        if wrong:
            raise UserError(wrong)


def _call(config: Any, name: str, runtime: Mapping[str, Any]) -> Any:
    """Calls the callable of a spec, after checks of its arguments."""
    location = config[TARGET]
    target = _locate(location)
    parameters = _parameters(target)
    arguments = dict(runtime)
    for key in [*config, *runtime]:
        if key != TARGET:
            _check_known(location, key, parameters)
        if key != TARGET and key not in runtime:
            arguments[key] = build(config[key], Any, f"{name}.{key}")
            _check_kind(f"{name}.{key}", arguments[key], parameters[key])
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in arguments:
            raise UserError(f"{location} needs {key!r}, which neither config nor caller has")
    return target(**arguments)


def choose(choices: Mapping[str, Any], name: str, what: str) -> Any:
    """Looks up a named choice of an axis.

    Args:
        choices: the choices by name.
        name: the name of one of them.
        what: the name of the axis in errors.

    Raises:
        UserError: the name is unknown; the nearest known one is in the message.
    """
    if not isinstance(name, str) or name not in choices:
        raise UserError(f"no {what} is called {name!r}; {nearest(name, choices)}")
    return choices[name]


def parse_arguments(text: str, *axes: str) -> dict[str, str]:
    """Parses the text after the colon of `--config=file.py:objective=ddpm,model=unet`.

    Args:
        text: comma-separated pairs `axis=choice`; it may be empty.
        *axes: the axes of the config.

    Returns:
        The choices by axis.

    Raises:
        UserError: a pair has no `=`, or an axis is unknown or occurs twice.

    Example:
        >>> parse_arguments("objective=ddpm,model=unet", "objective", "model", "path")
        {'objective': 'ddpm', 'model': 'unet'}
    """
    chosen: dict[str, str] = {}
    for pair in filter(None, text.split(",")):
        axis, equals, choice = pair.partition("=")
        if not equals:
            raise UserError(f"config argument {pair!r} is not of the form axis=choice")
        if axis not in axes:
            raise UserError(f"this config has no axis {axis!r}; {nearest(axis, axes)}")
        if axis in chosen:
            raise UserError(f"config argument {axis!r} occurs twice")
        chosen[axis] = choice
    return chosen


def to_json(config: ConfigDict) -> str:
    """The config as JSON text, with keys in alphabetical order."""
    return json.dumps(_plain(config), indent=2) + "\n"


def _plain(tree: Any) -> Any:
    """Replaces configs and tuples by dicts and lists, at any depth."""
    if isinstance(tree, ConfigDict):
        tree = tree.to_dict()
    if isinstance(tree, dict):
        return {name: _plain(value) for name, value in tree.items()}
    return [_plain(item) for item in tree] if isinstance(tree, list | tuple) else tree


def from_json(
    text: str,
    allowed_packages: tuple[str, ...] = ("diffjax",),
    upgrade: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
) -> ConfigDict:
    """Reads a config from JSON text that `to_json` wrote; the config is locked.

    A saved config names callables that `build` imports. Only those of `allowed_packages` are
    accepted, so an untrusted run folder can't run other code. In diffjax itself, only the parts of
    an experiment are accepted: data, networks, objectives, paths, samplers,
    extractors and evaluators.

    Args:
        text: the JSON text.
        allowed_packages: the names of packages whose callables may occur.
        upgrade: changes the tree first; for configs that an earlier version saved.

    Raises:
        UserError: the text is not a saved config, or it names a callable that is not accepted.
    """
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a saved config: {error}") from error
    if not isinstance(tree, dict):
        raise UserError("not a saved config: the JSON is not an object")
    try:
        tree = upgrade(tree)
        _check_packages(tree, allowed_packages)
        return _config(tree)
    # Keys with dots, and whatever else a ConfigDict refuses.
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"not a saved config: {error}") from error


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The hyper-parameters of a callable, in order."""
    try:
        signature = inspect.signature(target, eval_str=True)
    except (AttributeError, NameError):  # Annotations that only type checkers can resolve.
        signature = inspect.signature(target)
    except ValueError as error:
        raise UserError(f"{target.__module__}:{target.__qualname__}: {error}") from error
    hidden = _FLAX_WIRING if "parent" in signature.parameters else ()
    return {name: p for name, p in signature.parameters.items() if name not in hidden}


def _check_known(location: str, name: str, parameters: Mapping[str, Any]) -> None:
    if name not in parameters:
        raise UserError(f"{location} has no parameter {name!r}; {nearest(name, parameters)}")


def _check_kind(name: str, value: Any, parameter: inspect.Parameter) -> None:
    """Checks a value against the annotation of its parameter, or else against its default."""
    default, declared = parameter.default, parameter.annotation
    plain = isinstance(default, int | float | str) and not isinstance(default, bool)
    if declared is inspect.Parameter.empty:
        declared = (str if isinstance(default, str) else float) if plain else Any
    wrong = complaint(name, value, declared)
    if wrong:
        raise UserError(f"{wrong}, like {default!r}" if plain else wrong)


def _locate(location: Any) -> Callable[..., Any]:
    module_name, _, attribute = str(location).partition(":")
    try:
        module = importlib.import_module(module_name)
    # An empty or a relative name is no name of a module.
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f"config names {location!r}, but {error}") from error
    # Only callables that the module itself defines, not those that it imports.
    own = {n: v for n, v in vars(module).items() if getattr(v, "__module__", "") == module_name}
    if not callable(own.get(attribute)):
        raise UserError(f"{module_name} has no {attribute!r}; {nearest(attribute, own)}")
    return own[attribute]


def _check_packages(tree: Any, allowed: tuple[str, ...]) -> None:
    if isinstance(tree, list):
        for item in tree:
            _check_packages(item, allowed)
    if isinstance(tree, dict):
        location = tree.get(TARGET)
        if TARGET in tree and not _may_be_named(location, allowed):
            raise UserError(
                f"saved config names {location!r}, which is not a part of an experiment in "
                f"{', '.join(allowed)}{_how_to_allow(location, allowed)}"
            )
        for value in tree.values():
            _check_packages(value, allowed)


def _how_to_allow(location: Any, allowed: tuple[str, ...]) -> str:
    """What a user who trusts a package may do; "" if it is allowed, or has no name."""
    package = str(location).partition(":")[0].partition(".")[0]
    if package in allowed or not package.isidentifier():
        return ""
    return (
        f"; if you trust it, set --allowed_packages={package}, or in Python "
        f"allowed_packages={(*allowed, package)}"
    )


def _may_be_named(location: Any, allowed: tuple[str, ...]) -> bool:
    module, colon, attribute = location.partition(":") if isinstance(location, str) else [""] * 3
    package, _, room = module.partition(".")
    if not colon or package not in allowed or attribute.startswith("_"):
        return False
    return package != "diffjax" or any(
        room == known or room.startswith(f"{known}.") for known in _VOCABULARY
    )


def _config(tree: Any) -> Any:
    """Turns lists and dicts of JSON into tuples and locked configs, as configs contain them."""
    if isinstance(tree, list):
        return tuple(_config(item) for item in tree)
    if isinstance(tree, dict):
        return ConfigDict({name: _config(value) for name, value in tree.items()}).lock()
    return tree
