"""Configs are data that names real callables.

`spec` turns a callable and its hyper-parameters into a `ConfigDict`; `build` turns that back into
an object. In between it is plain data: it prints, diffs, saves as JSON, and every default can be
overridden by a flag.
"""

import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from diffjax.errors import UserError, nearest
from diffjax.kinds import complaint

TARGET = "_target_"
# Of diffjax, a saved config may name what describes an experiment, and nothing that writes, fetches
# by itself or starts programs: its loop, its folders, its pages.
_VOCABULARY = (
    "data",
    "evaluation.extractors",
    "models",
    "objectives",
    "process",
    "sampling",
    "training.nonfinite",
    "training.optimizer",
)
# Flax adds these two to every module, always together; they are wiring, not hyper-parameters.
_FLAX_WIRING = ("parent", "name")


def spec(target: Callable[..., Any], /, **overrides: Any) -> ConfigDict:
    """Describes a call of `target` as data, with all its defaults spelled out.

    Arguments of `target` that have neither a default nor an override are left out: they are
    runtime arguments, given to `build`.

    Args:
        target: a class or function that can be imported by its module and name.
        **overrides: hyper-parameters; nested specs are welcome.

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
        name: overrides[name] if name in overrides else _as_spec(parameter.default)
        for name, parameter in parameters.items()
        if name in overrides or parameter.default is not inspect.Parameter.empty
    }
    return ConfigDict({TARGET: location, **fields})


def _as_spec(default: Any) -> Any:
    """A default that is a small value object as the spec that makes it."""
    if not dataclasses.is_dataclass(default) or isinstance(default, type):
        return default
    fields = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    return spec(type(default), **{name: _as_spec(value) for name, value in fields.items()})


def defaults(location: str) -> dict[str, Any]:
    """What `spec` says of a callable that nothing is asked of, as plain JSON.

    Example:
        >>> defaults("diffjax.process.paths:Cosine")["t_noise"]
        0.999
    """
    return _plain(spec(_locate(location)))


def build(config: Any, declared: Any = Any, name: str = "", /, **runtime: Any) -> Any:
    """Calls what a spec describes, innermost specs first.

    The values of a config are compared with what the callable's annotations declare
    (`diffjax.kinds`); runtime arguments are not.

    Args:
        config: a spec; tuples and dicts of specs are built element by element, anything else is
            returned as it is.
        declared: what has to come out, as an annotation.
        name: what the config is called in errors; by default what it names.
        **runtime: arguments of the outermost call that no config can hold (a shared path, the
            number of classes).

    Raises:
        UserError: a key that the callable does not take, a runtime argument that is missing, a
            value of another kind or out of range, or a target that does not exist; names the
            nearest known one.

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
    """What the callable of a spec returns, its arguments checked."""
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
            raise UserError(f"{location} needs {key!r}, which neither config nor caller gives")
    return target(**arguments)


def choose(choices: Mapping[str, Any], name: str, what: str) -> Any:
    """Looks up one named choice of an axis.

    Raises:
        UserError: there is none of that name; the nearest one is in the message.
    """
    if not isinstance(name, str) or name not in choices:
        raise UserError(f"no {what} is called {name!r}; {nearest(name, choices)}")
    return choices[name]


def parse_arguments(text: str, *axes: str) -> dict[str, str]:
    """Splits what follows the colon of `--config=file.py:objective=ddpm,model=unet`.

    Args:
        text: comma-separated `axis=choice` pairs, or nothing.
        *axes: the axes that the config has.

    Raises:
        UserError: a pair without `=`, an unknown axis, or one given twice.

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
            raise UserError(f"config argument {axis!r} is given twice")
        chosen[axis] = choice
    return chosen


def to_json(config: ConfigDict) -> str:
    """The config as JSON text, keys in alphabetical order."""
    return json.dumps(_plain(config), indent=2) + "\n"


def _plain(tree: Any) -> Any:
    """Dicts and lists instead of configs and tuples, to any depth."""
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
    """A locked config from JSON text that `to_json` wrote.

    A saved config names callables that `build` will import, so only those of `allowed_packages`
    are accepted: a run folder from a stranger can't run code of its choice. Of diffjax itself, only
    the parts of an experiment are: data, networks, objectives, paths, samplers, extractors.

    Args:
        text: the JSON.
        allowed_packages: whose callables it may name.
        upgrade: what is made of its content first; for a config of an earlier version.

    Raises:
        UserError: it is not such JSON, or it names a callable of another package.
    """
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a saved config: {error}") from error
    if not isinstance(tree, dict):
        raise UserError("not a saved config: the JSON is no object")
    try:
        tree = upgrade(tree)
        _check_packages(tree, allowed_packages)
        return _config(tree)
    # Keys with dots, and whatever else a config does not take.
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"not a saved config: {error}") from error


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Hyper-parameters of a callable, in order."""
    try:
        signature = inspect.signature(target, eval_str=True)
    except (AttributeError, NameError):  # Annotations that are only there for type checkers.
        signature = inspect.signature(target)
    except ValueError as error:
        raise UserError(f"{target.__module__}:{target.__qualname__}: {error}") from error
    hidden = _FLAX_WIRING if "parent" in signature.parameters else ()
    return {name: p for name, p in signature.parameters.items() if name not in hidden}


def _check_known(location: str, name: str, parameters: Mapping[str, Any]) -> None:
    if name not in parameters:
        raise UserError(f"{location} has no parameter {name!r}; {nearest(name, parameters)}")


def _check_kind(name: str, value: Any, parameter: inspect.Parameter) -> None:
    """Refuses a value that is not what its annotation, or else its default, declares."""
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
    # Only what the module itself defines: its own imports are not part of its vocabulary.
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
                f"saved config names {location!r}, which is no part of an experiment in "
                f"{', '.join(allowed)}; if you trust it, pass allowed_packages"
            )
        for value in tree.values():
            _check_packages(value, allowed)


def _may_be_named(location: Any, allowed: tuple[str, ...]) -> bool:
    module, colon, attribute = location.partition(":") if isinstance(location, str) else [""] * 3
    package, _, room = module.partition(".")
    if not colon or package not in allowed or attribute.startswith("_"):
        return False
    return package != "diffjax" or any(
        room == known or room.startswith(f"{known}.") for known in _VOCABULARY
    )


def _config(tree: Any) -> Any:
    """JSON has only lists; configs have only tuples, and configs in them."""
    if isinstance(tree, list):
        return tuple(_config(item) for item in tree)
    if isinstance(tree, dict):
        return ConfigDict({name: _config(value) for name, value in tree.items()}).lock()
    return tree
