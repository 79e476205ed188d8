"""Loading a config file, and its settings by their dotted names."""

import ast
import dataclasses
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import RequiredValueError

from diffjax.errors import UserError, nearest

T = TypeVar("T")


def name_of(location: str) -> str:
    """The file's stem: `digits` for `configs/digits.py:objective=ddpm`.

    Example:
        >>> name_of("configs/digits.py:objective=ddpm")
        'digits'
    """
    return Path(location.partition(":")[0]).stem


def place_of(path: str) -> Path:
    """Where a config file is: in the current folder, or else beside the installed packages.

    A name, as `digits`, is one in the folder `configs`. A relative path that is no file here is
    looked for along Python's path, as a module would be, so that the configs of an installed
    diffjax are found from any folder.

    Returns:
        The path of the file; without one, where it would be in the current folder.

    Example:
        >>> place_of("digits").name, place_of("configs/nothing.py").as_posix()
        ('digits.py', 'configs/nothing.py')
    """
    named = [] if Path(path).suffix or "/" in path else [Path("configs") / f"{path}.py"]
    candidates = (Path(folder) / one for one in [Path(path), *named] for folder in ("", *sys.path))
    return next((file for file in candidates if file.is_file()), Path(path))


def load(location: str, given: Mapping[str, str] = MappingProxyType({})) -> ConfigDict:
    """The config that a file's `get_config` returns.

    Where a config depends on some of its settings, such as the folder that it begins with,
    `get_config` has them as keyword arguments, with `_` for the dots of their names:

        def get_config(arguments: str = "", *, init_from: str = "", data_path: str = "")

    Args:
        location: `path.py`, or `path.py:text` to call `get_config(text)`; `digits` is
            `configs/digits.py`.
        given: texts of settings by dotted name, as `override` sets them; `get_config` receives
            those that it has as keyword arguments.

    Raises:
        UserError: there is no such file, it has a bug (named by line), or it returns no config.
    """
    if not location:
        raise UserError(f"--config=FILE.py is missing; {nearest('', _config_files(Path()))}")
    path, colon, text = location.partition(":")
    named = {name.removeprefix("config.").replace(".", "_"): text for name, text in given.items()}
    return returned_by(path, "get_config", ConfigDict, *((text,) if colon else ()), given=named)


def returned_by(
    path: str,
    name: str,
    kind: type[T],
    *arguments: str,
    given: Mapping[str, str] = MappingProxyType({}),
) -> T:
    """What a function in a file returns.

    Args:
        path: the path of the file.
        name: the name of the function.
        kind: what it has to return.
        arguments: what it is called with.
        given: further ones by name, of which it receives those that it can take by name alone.

    Raises:
        UserError: there is no such file or function, it has a bug (named by line), it takes other
            arguments, or it returns something else.
    """
    place = place_of(path)
    module = _as_written(place, lambda: _execute(place, path))
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{path} defines no {name}()")
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        passed = f"the arguments {arguments[0]!r}" if arguments else "no arguments after a colon"
        raise UserError(
            f"{path} has {name}{inspect.signature(function)}, but --config passes {passed}"
        ) from None
    known = inspect.signature(function).parameters.values()
    keywords = {x.name for x in known if x.kind is inspect.Parameter.KEYWORD_ONLY}
    named = {key: text for key, text in given.items() if key in keywords}
    result = _as_written(place, lambda: function(*arguments, **named))
    if not isinstance(result, kind):
        raise UserError(f"{name}() in {path} returns {type(result).__name__}, no {kind.__name__}")
    return result


@dataclasses.dataclass(frozen=True)
class Setting:
    """One value in a config that a flag can override."""

    name: str
    group: ConfigDict
    key: str
    kind: type
    default: Any

    def parse(self, text: str) -> Any:
        """The text of a flag as a value of this setting's type.

        Raises:
            UserError: the text is not a value of that type.
        """
        if self.kind is float and text.lstrip().startswith("{"):
            return self._group(text)
        try:
            value = _PARSERS.get(self.kind, _literal)(text, self.default)
        except (TypeError, ValueError, OverflowError):
            example = f" like {self.default!r}" if isinstance(self.default, tuple) else ""
            raise UserError(
                f"{self.name} expects {self.kind.__name__}{example}, got {text!r}"
            ) from None
        check_size(self.name, value)
        return value

    def set(self, value: Any) -> None:
        """Overrides the value in the config.

        Raises:
            UserError: the config does not take a value of that type.
        """
        try:
            if isinstance(value, ConfigDict):
                with self.group.ignore_type():
                    self.group[self.key] = value
            else:
                self.group[self.key] = value
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{self.name}: {error}") from error

    def _group(self, text: str) -> ConfigDict:
        """Numbers by name in the place of one number, as `{"text": 0.1}`."""
        try:
            value = ast.literal_eval(text)
            return ConfigDict({str(key): float(number) for key, number in value.items()})
        except (*_NO_LITERAL, TypeError, AttributeError):
            raise UserError(
                f"{self.name} expects numbers by name, like {{'text': 0.1}}, got {text!r}"
            ) from None


def check_size(name: str, value: Any) -> None:
    """Refuses whole numbers of more than 32 bits, alone or in a tuple.

    No array is that long, and without 64-bit numbers JAX takes the seeds 1 and 2³² + 1 for one.

    Raises:
        UserError: see above.

    Example:
        >>> check_size("--seed", 7)
        >>> check_size("--seed", 2**32 + 1)
        Traceback (most recent call last):
        ...
        diffjax.errors.UserError: --seed=4294967297 is out of range: at most 2147483647
    """
    for number in value if isinstance(value, tuple | list) else (value,):
        if isinstance(number, int) and abs(number) > _LARGEST:
            raise UserError(f"{name}={number} is out of range: at most {_LARGEST}")


def override(config: ConfigDict, texts: Mapping[str, str]) -> dict[str, Setting]:
    """Sets settings by their dotted names, as flags would, and returns all that there are.

    Raises:
        UserError: one does not exist or takes another type.

    Example:
        >>> config = ConfigDict({"seed": 0})
        >>> _ = override(config, {"config.seed": "7"})
        >>> config.seed
        7
    """
    known = settings(config)
    for name, text in texts.items():
        if name not in known:
            raise UserError(f"there is no setting {name}; {nearest(name, known)}")
        known[name].set(known[name].parse(text))
    return known


def settings(config: ConfigDict, name: str = "config") -> dict[str, Setting]:
    """All settings of a config by dotted name; elements of tuples of configs by `[index]`.

    Example:
        >>> list(settings(ConfigDict({"seed": 0, "model": {"width": 64}})))
        ['config.model.width', 'config.seed']
    """
    found: dict[str, Setting] = {}
    for key, value in config.items(preserve_field_references=True):
        dotted = f"{name}.{key}"
        kind = type(value)
        if isinstance(value, FieldReference):
            kind, value = value.get_type(), None
        nested = value if isinstance(value, tuple) else ()
        if isinstance(value, ConfigDict):
            found |= settings(value, dotted)
        elif any(isinstance(item, ConfigDict) for item in nested):
            for i, item in enumerate(nested):
                found |= settings(item, f"{dotted}[{i}]") if isinstance(item, ConfigDict) else {}
        else:
            found[dotted] = Setting(dotted, config, key, kind, value)
    return found


def lock(config: ConfigDict, known: Mapping[str, Setting]) -> ConfigDict:
    """Locks a config, with those inside tuples, once nothing in it is left open.

    Raises:
        UserError: a required placeholder has no value; names the flag that fills it.
    """
    for setting in known.values():
        try:
            setting.group[setting.key]
        except RequiredValueError:
            raise UserError(f"{setting.name} has no default; set --{setting.name}=...") from None
    for setting in known.values():
        setting.group.lock()
    return config.lock()


def _execute(place: Path, path: str) -> ModuleType:
    if not place.is_file():
        files = _config_files(place.parent)
        folder = Path(files[0]).parent if files else place.parent
        raise UserError(
            f"there is no config file {place}; "
            + nearest(str(folder / place.with_suffix(".py").name), files)
        )
    # The dotted name lets `spec` refer to a class that the config file itself defines.
    written = Path(path if Path(path).suffix or "/" in path else f"configs/{path}")
    name = ".".join(written.with_suffix("").parts)
    module_spec = importlib.util.spec_from_file_location(name, place)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{place} is no Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    module_spec.loader.exec_module(module)
    return module


def _as_written(path: Path, action: Callable[[], Any]) -> Any:
    """Runs code of a config file; a bug in it becomes one line with its place."""
    try:
        return action()
    except UserError:
        raise
    except SyntaxError as error:
        where = error.filename if error.filename != os.path.abspath(path) else path
        raise UserError(f"{where}:{error.lineno}: SyntaxError: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(path)]
        where = f"{path}:{lines[-1]}" if lines else path
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error


def _config_files(folder: Path) -> list[str]:
    """The config files beside a wrong path, or else those of `configs/`, here or installed."""
    installed = ((Path(path), Path("configs")) for path in ("", *sys.path))
    for root, inside in ((Path(), folder), *installed):
        files = sorted((root / inside).glob("*.py")) if inside != Path() else []
        if files:
            return [str(inside / file.name) for file in files if not file.name.startswith("_")]
    return []


def _boolean(text: str, default: Any) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError(text)
    return text.lower() in ("true", "1")


def _tuple(text: str, default: Any) -> tuple[Any, ...]:
    """`(1, 2)`, `1,2` or `a,b`, with elements of the type that the default has."""
    try:
        value = ast.literal_eval(text) if text else ()
    except _NO_LITERAL:
        # A comma at the end is allowed, as in Python.
        value = tuple(part.strip() for part in text.strip().removesuffix(",").split(","))
    value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    kinds = {type(item) for item in default or ()}
    if kinds == {float}:
        value = tuple(float(item) for item in value)
    if kinds and not {type(item) for item in value} <= kinds:
        raise ValueError(text)
    return value


def _literal(text: str, default: Any) -> Any:
    """For a default of None, any Python literal, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except _NO_LITERAL:
        return text


_LARGEST = 2**31 - 1
# The last two of what is nested too deeply.
_NO_LITERAL = (ValueError, SyntaxError, MemoryError, RecursionError)
_PARSERS: dict[type, Callable[[str, Any], Any]] = {
    bool: _boolean,
    int: lambda text, default: int(text),
    float: lambda text, default: float(text),
    str: lambda text, default: text,
    tuple: _tuple,
}
