"""Common code of all executables: parsing flags, and reporting errors in one line.

A script defines its flags on its own `FlagValues` and passes them to `run` with its `main`:

    FLAGS = flags.FlagValues()
    cli.define_config(FLAGS)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)

    def main(args):                # args.workdir, args.config, args.config_name
        ...

    if __name__ == "__main__":
        sys.exit(cli.run(main, FLAGS, usage=__doc__))

`main` receives plain values, so tests and notebooks can call it without flags.
"""

import atexit
import contextlib
import copy
import ctypes
import difflib
import errno
import importlib
import inspect
import io
import itertools
import logging
import math
import os
import re
import signal
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
from absl import flags

import experiments
from diffjax import choices, config_files
from diffjax.errors import UserError, whole_number
from diffjax.host.files import place_of
from diffjax.host.progress import progress
from diffjax.spec import TARGET, build
from experiments.flags import shared

# M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX of glibc's malloc.h: use one heap only, which never
# shrinks.
_MALLOC = ((-4, 0), (-1, -1), (-8, 1))
_HELP = frozenset({"--help", "-help", "-h", "-?", "--helpshort", "--helpfull"})


def define_config(flag_values: flags.FlagValues, *, optional: bool = False) -> None:
    """Defines `--config=FILE.py[:axis=choice,...]` and a flag for every setting in that file.

    `main` receives the locked config as `args.config`, the file's stem as `args.config_name`, and
    the names of the settings on the command line as `args.given`; without a file the first two are
    None, if it is optional.
    """
    about = "config file, or its name, with choices after a colon: digits:objective=ddpm"
    more = "" if optional else "; every setting in it is also a flag: --config.num_steps=100"
    flags.DEFINE_string("config", "" if optional else None, about + more, flag_values=flag_values)


class _Step(flags.ArgumentParser):
    """A step, as a number or by the name of the best checkpoint."""

    def parse(self, argument: Any) -> int | str:
        """The value as `diffjax.load` takes it."""
        text = str(argument)
        step = text if text == "best" else whole_number(text)
        if step is None:
            raise ValueError("it is the number of a step that has a checkpoint, or best")
        return step


class _Steps(_Step):
    """Several steps, comma-separated, or all that there are."""

    def parse(self, argument: Any) -> list[int | str] | str:
        """A list of values as `diffjax.load` takes them, or "all"."""
        text = str(argument)
        return text if text == "all" else [super(_Steps, self).parse(x) for x in text.split(",")]


def define_steps(flag_values: flags.FlagValues) -> None:
    """Defines `--step=100,200`, `--step=all` and `--step=best`: which checkpoints of a run."""
    help = "of checkpoints, as 100,200; all; or best (config.best_by); by default the newest"
    flags.DEFINE_flag(flags.Flag(_Steps(), None, "step", None, help), flag_values)


def define_step(flag_values: flags.FlagValues) -> None:
    """Defines `--step=400` and `--step=best`: which checkpoint of a run."""
    help = "of a checkpoint, or best (config.best_by); by default the newest"
    flags.DEFINE_flag(flags.Flag(_Step(), None, "step", None, help), flag_values)


def run(
    main: Callable[[SimpleNamespace], int | None],
    flag_values: flags.FlagValues,
    *,
    usage: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses the command line, calls `main(args)` and returns the exit status.

    A `UserError` is printed as one line on stderr; other exceptions keep their traceback.

    Args:
        main: the program; it returns None or 0 for success.
        flag_values: the flags of this script; they are not changed.
        usage: text that `--help` prints before the flags.
        argv: the command line after the program's name; by default that of this process.

    Returns:
        0 after success or `--help`, 2 after a user's error (75 after a temporary one: another
        process of the run was lost), 130 after Ctrl-C, 143 after SIGTERM.
    """
    as_program, argv = argv is None, list(sys.argv[1:] if argv is None else argv)
    if signal.getsignal(signal.SIGINT) is experiments.end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if _HELP.intersection(argv):
        try:
            print(f"{usage.strip()}\n\nFlags:\n{_describe(flag_values)}", flush=True)
        except BrokenPipeError:  # For example `--help | head`.
            _is_closed(sys.stdout)
        return 0
    # Libraries (worker processes of the input pipeline) need absl's own flags to be marked as
    # parsed; these flags are not used here.
    flags.FLAGS.mark_as_parsed()
    _set_up_logging()
    _escape_unprintable()
    _keep_compiled_programs()
    keep_freed_memory()
    try:
        args = _parse(flag_values, argv)
        shared.join_processes(args)
        with _without_closed_loop_tracebacks():
            return main(args) or 0
    except UserError as error:
        _print_last_line("error: " + " ".join(str(error).split()))
        status = getattr(error, "status", 2)
        shared.leave_processes(status)
        return status
    except KeyboardInterrupt as interrupt:
        _print_last_line(str(interrupt) or "interrupted")
        status = 128 + getattr(interrupt, "signal", signal.SIGINT)
        if as_program:
            # Python would wait for what devices still compute, and for XLA that still compiles.
            sys.stdout.flush()
            atexit.register(os._exit, status)
        return status
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            _print_last_line(f"error: {error.filename}: {error.strerror}")
            return 2
        if isinstance(error, BrokenPipeError) and _is_closed(sys.stdout):
            return 128 + signal.SIGPIPE
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        shared.leave_processes(1)
        raise


def _print_last_line(line: str) -> None:
    """Prints a last line to stderr, which may be closed; the exit status has the same meaning."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _is_closed(stream: Any) -> bool:
    """Whether a stream is closed by its reader; if so, redirects it to the null device."""
    try:
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False


def _escape_unprintable() -> None:
    """Escapes characters that the terminal can't print, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _without_closed_loop_tracebacks() -> Iterator[None]:
    """Suppresses the tracebacks of writes that fail after the first failure.

    When a disk is full, Orbax raises the first failure and closes its event loop. TensorStore then
    can't report the other failed writes to that loop, and prints a traceback for each of them.
    """
    original = sys.unraisablehook

    def print_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            original(unraisable)

    sys.unraisablehook = print_others
    try:
        yield
    finally:
        sys.unraisablehook = original


def require(args: SimpleNamespace, name: str) -> None:
    """Checks that a flag without a default is set.

    Raises:
        UserError: the flag is not set.
    """
    if getattr(args, name) in (None, ""):
        raise UserError(f"--{name} is missing; --help describes it")


def save(path: str, text: str) -> None:
    """Writes text to the file of a flag.

    Raises:
        UserError: the file can't be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error


def config_names() -> list[str]:
    """Names of the config files in the folder `configs`, of this folder or installed."""
    return sorted(path.stem for path in config_files.place_of("digits").parent.glob("*.py"))


def describe_tables(tables: Mapping[str, Iterable[str]]) -> str:
    """Formats axes and their choices as lines of `--help`."""
    return "\n".join(f"  {axis + '=':<11} {', '.join(names)}" for axis, names in tables.items())


def describe_sampling() -> str:
    """What may be chosen of sampling, as lines of `--help`."""
    return f"""Solvers:
{describe_solvers()}
Grids: {", ".join(choices.GRIDS)}; found, by experiments.find_grid
Guidance: {", ".join(choices.GUIDANCE)}; joined by +, the innermost first"""


AGAINST = (
    "Against: null, label:3, prompt:TEXT, weights:ema-0.99, weights:FOLDER+null, classifier:FILE, "
    "attention:LAYERS, blocks:block_[789]"
)


def describe_solvers() -> str:
    """Formats solvers as lines of `--help`: order, evaluations per step, description."""
    rows = []
    for name, row in choices.SOLVERS.items():
        solver = build(row)
        module, _, function = row[TARGET].partition(":")
        about = inspect.getdoc(getattr(importlib.import_module(module), function)) or ""
        paper = re.search(r"arXiv:[0-9.]+[0-9]", about)
        first = about.splitlines()[0].rstrip(".")
        rows.append(
            f"  {name:<16} order {solver.order}, {solver.nfe or 'any'} per step: {first}"
            + (f" ({paper[0]})" if paper else "")
        )
    return "\n".join(rows)


def _set_up_logging() -> None:
    """Prints the library's log messages to stderr, one line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("diffjax")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # Orbax also logs a long traceback, from several threads, for each error that it raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def keep_compiled_programs(folder: str) -> None:
    """Enables JAX's compilation cache in a folder, so that later starts skip compilation.

    Raises:
        UserError: the folder can't be created or written to.
    """
    place = place_of(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"can't write compiled programs to {place}: {error.strerror}") from error
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _keep_compiled_programs() -> None:
    """Enables the cache in its default folder, if none is set and the folder is writable."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        with contextlib.suppress(UserError):
            keep_compiled_programs("~/.cache/diffjax")


def keep_freed_memory() -> None:
    """Makes the C library keep memory that XLA frees, instead of returning it to the system.

    XLA:CPU allocates and frees the temporaries of a whole step each time, and the system then has
    to clear these pages again: a tenth of the time of a training step of DiT-S/2 on two cores
    (docs/performance.md). It has no effect if the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC:
            mallopt(option, value)


def _parse(flag_values: flags.FlagValues, argv: list[str]) -> SimpleNamespace:
    """Parses all flags; loads, overrides and locks the config."""
    names = list(flag_values)
    if "config" not in names:
        parsed = _read(flag_values, argv)
        return SimpleNamespace(**{name: parsed[name].value for name in names})

    # The settings of the config are flags too, and their names are only known from the file.
    flag = _read(flag_values, argv, known_only=True)["config"]
    location = flag.value or ""
    if not location and flag.default == "" and not flag.present:
        parsed = _read(flag_values, argv)
        values = {name: parsed[name].value for name in names}
        return SimpleNamespace(**values | {"config": None, "config_name": None, "given": []})
    with progress(f"reading {location} and what it names"):
        config = config_files.load(location, _given(argv))
    settings = config_files.settings(config)
    flag_values = copy.deepcopy(flag_values)
    for name, setting in settings.items():
        flags.DEFINE_flag(
            flags.Flag(
                parser=_SettingParser(setting),
                serializer=None,
                name=name,
                default=None,
                help_string="",
                boolean=setting.kind is bool,
            ),
            flag_values,
            module_name="config",
        )
    parsed = _read(flag_values, argv)
    for name, setting in settings.items():
        if parsed[name].present:
            setting.set(parsed[name].value)
    values = {name: parsed[name].value for name in names}
    values["config"] = config_files.lock(config, settings)
    values["config_name"] = config_files.name_of(location)
    values["given"] = [name for name in settings if parsed[name].present]
    return SimpleNamespace(**values)


def _given(argv: Sequence[str]) -> dict[str, str]:
    """The texts of all settings of the config on the command line, by dotted name.

    Example:
        >>> _given(["--config=a.py", "--config.seed=3", "-config.name", "x=y"])
        {'config.seed': '3', 'config.name': 'x=y'}
    """
    given = {}
    for word, after in itertools.pairwise([*argv, ""]):
        name, equals, text = word.lstrip("-").partition("=")
        if word.startswith("-") and name.startswith("config."):
            given[name] = text if equals else after
    return given


def _read(
    flag_values: flags.FlagValues, argv: list[str], known_only: bool = False
) -> flags.FlagValues:
    """Parses a copy of the flags, so that the script's own flags are not changed."""
    parsed = copy.deepcopy(flag_values)
    parsed.set_gnu_getopt(True)
    try:
        rest = parsed(["", *argv], known_only=known_only)
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown(error.flagname, list(parsed))) from error
    except flags.Error as error:
        # absl wraps the exception of a parser and adds the name of the flag again.
        inner = error.__context__
        raise UserError(
            str(inner) if isinstance(inner, UserError) else _readable(str(error), parsed)
        ) from error
    for name in parsed:
        value = parsed[name].value
        config_files.check_size(f"--{name}", value)
        # Settings may be infinite, for example the largest noise of a path.
        if "." not in name and isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} needs a finite number, not {value}")
    if len(rest) > 1 and not known_only:
        raise UserError(f"unexpected argument {rest[1]!r}; every argument is --flag=value")
    return parsed


def _readable(message: str, flag_values: flags.FlagValues) -> str:
    """A message of absl, where it would quote those of Python's `int`, `float` and `bool`."""
    quoted = r"flag --(\w+)=(.*): (?:invalid literal|could not convert|\('Non-boolean).*"
    found = re.fullmatch(quoted, message, re.DOTALL)
    if found is None:
        return message
    name, text = found.groups()
    kind = flag_values[name].parser.syntactic_help or "true or false"
    return f"flag --{name}={text}: {text!r} is not {kind}"


class _SettingParser(flags.ArgumentParser):
    """A parser with which absl parses one setting of a config."""

    def __init__(self, setting: config_files.Setting):
        self._setting = setting

    def parse(self, argument: Any) -> Any:
        return self._setting.parse(argument)


def _unknown(name: str, known: list[str]) -> str:
    """The error message for an unknown flag, with the nearest flag or the known ones."""
    inside = [f"--{other}" for other in known if other.startswith(f"{name}.")]
    if inside:
        return f"--{name} is a group of settings; set one of {', '.join(inside)}"
    # Compares the last part first: a right setting in the wrong group is the most common mistake.
    leaves = {other.rpartition(".")[2] for other in known}
    for leaf in difflib.get_close_matches(name.rpartition(".")[2], leaves, n=1, cutoff=0.75):
        full_names = [other for other in known if other.rpartition(".")[2] == leaf]
        (closest,) = difflib.get_close_matches(name, full_names, n=1, cutoff=0)
        return f"unknown flag --{name}; did you mean '--{closest}'?"
    group = name.rpartition(".")[0]
    while group and not any(other.startswith(f"{group}.") for other in known):
        group = group.rpartition(".")[0]
    prefix = f"{group}." if group else ""
    siblings = {other[len(prefix) :].split(".")[0] for other in known if other.startswith(prefix)}
    return f"unknown flag --{name}; known: " + ", ".join(
        f"--{prefix}{other}" for other in sorted(siblings)
    )


def _describe(flag_values: flags.FlagValues) -> str:
    """Formats one paragraph per flag, in the order of their definition."""
    lines = []
    for name in flag_values:
        flag = flag_values[name]
        default = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
        suffix = "" if default in (None, False, "") else f" (default: {default})"
        # What absl adds to flags that may be repeated.
        about = flag.help.partition(";\n    repeat this option")[0]
        text = f"--{name:<18}  {about}{suffix}"
        lines.append(textwrap.fill(text, 92, initial_indent="  ", subsequent_indent=" " * 24))
    return "\n".join(lines)
