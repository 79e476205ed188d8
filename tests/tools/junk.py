"""What a hand can type that means nothing: tries drawn from a seed, each of which has to end well.

    python -m tests.tools.junk --seed=7 --tries=2000

makes that many tries and prints each kind of failure once, with the number of a try that shows it.
A try ends well where it returns, raises `UserError`, or gets to where work begins: sampling,
training and evaluating are not what is tried here, so they are replaced by a stop.
"""

import argparse
import contextlib
import functools
import io
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict, config_dict

import diffjax
from configs import digits
from diffjax import choices, config_files, data
from diffjax.config_upgrade import upgrade
from diffjax.errors import UserError
from diffjax.evaluation.extractors import clip, dinov2, features, inception
from diffjax.host.watchdog import Watchdog
from diffjax.loop.profile import Profile
from diffjax.models.layers.common import HIDDEN
from diffjax.optimizers.descent import descent
from diffjax.process import paths, weights
from diffjax.runs import workdirs
from diffjax.runs.load import Run
from diffjax.runs.measuring import likelihoods, measure
from diffjax.sampling import solvers
from diffjax.sampling.sample import Recipe
from diffjax.spec import TARGET, build, from_json, spec, to_json
from diffjax.training import nonfinite
from experiments import (
    benchmark,
    edit,
    evaluate,
    export,
    find_grid,
    likelihood,
    objectives,
    plan,
    probe,
    reflow,
    report,
    sample,
    sweep,
    train,
    train_classifier,
    validate,
)
from experiments import solvers as solvers_page
from experiments.flags import cli
from tests.support.old_runs import OLD_RUN
from tests.support.one_process import Here

ROOT = Path(__file__).parents[2]


class WorkBegins(Exception):
    """All that could be refused was not."""


def work_begins(*args: Any, **kwargs: Any) -> Any:
    """Stands in the place of what takes time."""
    del args, kwargs
    raise WorkBegins


@contextlib.contextmanager
def without_work() -> Iterator[None]:
    """Within it, what takes time stops with `WorkBegins` once its arguments were checked."""
    build_parts, known = workdirs.build_parts, {}

    def cached(config: ConfigDict, *args: Any, **how: Any) -> Any:
        key = (to_json(config), args, tuple(sorted(how.items())))
        if key not in known:
            known[key] = build_parts(config, *args, **how)
        return known[key]

    def checks_alone(function: Callable, *args: Any) -> Any:
        if not function.__name__.startswith("check"):
            raise WorkBegins
        return function(*args)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("runs.samples.model", "runs.measuring.likelihoods", "studies.validation"):
            patch.setattr(f"diffjax.{module}.jit", lambda *args, **how: work_begins)
        patch.setattr(workdirs, "build_parts", cached)
        for place in (
            "jax.export.export",
            "diffjax.evaluation.metrics.reference",
            "diffjax.studies.probes.probe",
            "diffjax.runs.measuring.likelihoods.fitted",
            "diffjax.loop.loop.train_and_evaluate",
            "experiments.objectives.write_objectives_page",
            "experiments.plan.in_own_process",
            "experiments.solvers.convergence.convergence",
            "experiments.solvers.solver_costs",
            "experiments.sweep.run_workers",
            "experiments.sweep.be_worker",
            "experiments.sweep.train_cells",
            "experiments.train_classifier.fit",
        ):
            patch.setattr(place, work_begins)
        patch.setattr(benchmark, "in_new_process", checks_alone)
        patch.setattr(sweep, "ProcessPoolExecutor", Here)
        patch.setattr("diffjax.host.watchdog._watch", lambda *args: None)
        patch.setattr(cli, "_keep_compiled_programs", lambda: None)
        patch.setattr(cli, "keep_compiled_programs", lambda folder: None)
        yield


class Small(nn.Module):
    """A network that takes one time or two, and sows what objectives compare."""

    num_classes: int
    out_channels: int | None = None

    @nn.compact
    def __call__(self, x, noise_label, cond=None, train=False):
        h = nn.Dense(4)(x) + noise_label.reshape(len(x), -1).mean(-1)[:, None, None, None]
        h = h + nn.Embed(self.num_classes + 1, 4)(cond)[:, None, None]
        self.sow(*HIDDEN, h)
        return nn.Dense(self.out_channels or x.shape[-1])(nn.silu(h))


# Values.

NUMBERS = (
    0, -1, 1, 2, 3, 7, 0.0, -0.5, 0.5, 1.5, 2.5, 1e-300, 1e300, -1e300, float("nan"),
    float("inf"), -float("inf"), 10**12, -(10**12), 2**31, 2**32, 2**63, 10**400, -(2**31),
)  # fmt: skip
WORDS = (
    "", " ", "0", "1", "-1", "nan", "inf", "1e400", "None", "True", "junk", "a b", "é", "..", "/",
    "heun", "ddpm", "live", "ema-0.999", "ema-", "digits", "label:3", "label:99", "label:x",
    "weights:junk", "weights:", "cfg+limited", "cfg+", "+", "1,2", ",", ",,", "(1,", "[1]", "{}",
    "uniform", "found", "data", "3,7", "3,x", "\0", "a\nb", "1" * 400, "9" * 5000, "²", "٣",
    "~junk", "(" * 300, "[" * 9999,
)  # fmt: skip
TARGETS = (
    "diffjax.process.paths:Nothing", "no.such:thing", "junk", "", "diffjax", "os:system", ":",
    "diffjax.process.paths:np", "..:x", ".x:y", "diffjax.process.paths:", "diffjax.data:digits",
    "diffjax.errors:UserError", "diffjax.process.paths:Path", "diffjax.kinds:T", 3, None, (),
)  # fmt: skip


def _rows() -> list[ConfigDict]:
    """Specs of every kind of part."""
    tables = {**choices.AXES, "wrappers": choices.WRAPPERS, "solver": choices.SOLVERS}
    tables |= {"grid": choices.GRIDS, "guidance": choices.GUIDANCE, "against": choices.AGAINST}
    tables |= {"model": choices.MODELS_8X8}
    others = [
        data.digits, data.image_folder, data.mnist, data.fashion_mnist, data.latents, data.pairs,
        data.translation, data.colours, data.tfds_images, data.idx_images, data.Augment,
        data.Coarse, descent, nonfinite.NonFinite, Recipe, features.pixel_features,
        features.classifier_features, inception.inception_features, clip.clip_features,
        dinov2.dinov2_features,
    ]  # fmt: skip
    return [*(row for table in tables.values() for row in table.values()), *map(spec, others)]


ROWS = _rows()
NAMES = sorted(
    {name for table in choices.AXES.values() for name in table}
    | {*choices.SOLVERS, *choices.GRIDS, *choices.GUIDANCE, *choices.OBJECTIVES, *choices.AGAINST}
    | {*likelihoods.METHODS, *edit.TASKS, *edit.METHODS, "none", "uniform", "hutchinson", "exact"}
)  # fmt: skip
OBJECTS = (
    True, False, b"bytes", 1 + 2j, object(), len, dict, Path("x"), {1, 2}, np.float32(0.5),
    np.int64(3), np.zeros(2), np.array(["a"], object), np.full((2, 2), np.nan), paths.Linear(),
    weights.Constant(), solvers.heun(), ConfigDict(), {"a": 1}, {TARGET: 3}, {1: 2}, ...,
    range(3), np.array(2), np.array(True), config_dict.placeholder(int),
)  # fmt: skip


def value(rng: Random) -> Any:
    """Anything."""
    match rng.randrange(10):
        case 0 | 1 | 2:
            return rng.choice(NUMBERS)
        case 3 | 4:
            return rng.choice(WORDS)
        case 5:
            return rng.choice(OBJECTS)
        case 6:
            return None
        case 7:
            return part(rng)
        case 8:
            kind = rng.choice((tuple, list))
            return kind(value(rng) for _ in range(rng.randrange(4)))
        case _:
            return rng.choice((rng.randrange(20), rng.random(), {}, (), []))


def plain(rng: Random) -> Any:
    """A number, a word, or a list of those."""
    one = rng.choice((NUMBERS, WORDS, WORDS))
    return rng.choice((rng.choice(one), tuple(rng.choice(one) for _ in range(rng.randrange(3)))))


def alike(rng: Random, given: Any) -> Any:
    """Another value of the same kind, such as a number out of range; or a bare one for a list."""
    if isinstance(given, tuple):
        items = [alike(rng, rng.choice(given or (1, "a"))) for _ in range(rng.randrange(3))]
        return rng.choice((tuple(items), *items[:1]))
    if isinstance(given, bool):
        return not given
    if isinstance(given, int | float):
        kind = rng.choice((type(given), float, int))
        numbers = [number for number in NUMBERS if isinstance(number, kind)]
        return rng.choice((rng.choice(numbers), rng.randrange(100), rng.random()))
    return part(rng) if isinstance(given, ConfigDict) else rng.choice((*WORDS, *NAMES))


def part(rng: Random) -> ConfigDict:
    """A spec of some kind, most often changed."""
    row = choices.copy(rng.choice(ROWS))
    return changed(rng, row) if rng.randrange(3) else row


def places(tree: Any, within: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places in a config, groups and elements of tuples among them."""
    found = []
    if isinstance(tree, ConfigDict):
        for key in tree:
            found += [(*within, key), *places(tree[key], (*within, key))]
    if isinstance(tree, tuple):
        for i, item in enumerate(tree):
            found += places(item, (*within, i))
    return found


def changed(rng: Random, config: ConfigDict) -> ConfigDict:
    """A config with something somewhere else than it should be."""
    place = rng.choice(places(config))
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    if not isinstance(inner, ConfigDict):
        return config
    key = place[-1]
    refused = (TypeError, ValueError, AttributeError, KeyError, OverflowError)
    with contextlib.suppress(*refused), inner.unlocked(), inner.ignore_type():
        match rng.randrange(10):
            case 0:
                delattr(inner, key)
            case 1:
                inner[rng.choice(("junk", "path", "name", "seed", "sharding_rules"))] = value(rng)
            case 2:
                inner[key] = (inner[key],)
            case 3 if key == TARGET:
                inner[key] = rng.choice(ROWS)[TARGET]
            case _ if key == TARGET:
                inner[key] = rng.choice(TARGETS)
            case 4:
                inner[key] = part(rng)
            case 5 | 6:
                inner[key] = value(rng)
            case _:
                inner[key] = alike(rng, inner[key])
    return config


def config_of(rng: Random) -> ConfigDict:
    """A small config of the digits that is right."""
    arguments = f"objective={rng.choice(sorted(choices.OBJECTIVES))}"
    config = digits.get_config(arguments if rng.randrange(2) else "")
    if rng.randrange(3):
        config.model = spec(Small)
    else:
        config.model.update(hidden_size=8, depth=1, num_heads=1)
    return config


# Tries.


def prepare(rng: Random, where: Path) -> None:
    """A config with one or two mistakes, for everything that is checked before the first step."""
    config = config_of(rng)
    for _ in range(rng.choice((1, 1, 2))):
        config = changed(rng, config)
    with contextlib.suppress(AttributeError):
        config.lock()
    diffjax.train(config, where / "new")


def call_train(rng: Random, where: Path) -> None:
    """`diffjax.train` with other arguments."""
    config = digits.get_config()
    config.model = spec(Small)
    given = {"config": config, "workdir": where / "new", "command": ""}
    given |= {"watchdog": Watchdog(), "profile": Profile()}
    given[rng.choice(sorted(given))] = rng.choice(
        (value(rng), Watchdog(rng.choice(NUMBERS)), Profile(rng.choice(NUMBERS), 3))
    )
    diffjax.train(**given)


def folder_of(rng: Random, where: Path) -> Any:
    """The folder of the run, most often."""
    return OLD_RUN if rng.randrange(4) else rng.choice((where, str(where / "none"), value(rng)))


def call_load(rng: Random, where: Path) -> None:
    """`diffjax.load` with other arguments."""
    given: dict[str, Any] = {"workdir": folder_of(rng, where)}
    for name in ("mesh", "weights", "allowed_packages"):
        if not rng.randrange(3):
            given[name] = value(rng)
    diffjax.load(**given)


@functools.cache
def _loaded() -> Run:
    return diffjax.load(OLD_RUN)


def call_run(rng: Random, where: Path) -> None:
    """What a loaded run offers."""
    del where
    run = _loaded()
    calls: dict[str, tuple[str, ...]] = {
        "sample": ("condition", "source", "seed", "solver", "grid", "num_steps", "guidance_scale",
                   "guidance", "against", "weights", "batch_size"),
        "weights": ("name",),
        "model": ("weights",),
        "dataset": ("path",),
        "metrics": (),
    }  # fmt: skip
    name = rng.choice(("sample", "sample", "sample", "sample", *calls))
    given = {"condition": 4} if name == "sample" else {}
    for argument in rng.sample(calls[name], min(len(calls[name]), rng.choice((1, 1, 2)))):
        given[argument] = value(rng)
    getattr(run, name)(**given)


def wanted(rng: Random, where: Path) -> None:
    """An evaluation of a loaded run."""
    del where
    run = _loaded()
    fields = sorted(measure.Wanted.__dataclass_fields__)
    asked = measure.Wanted(**{name: value(rng) for name in rng.sample(fields, rng.choice((1, 2)))})
    measure.measure(run, run.dataset(), asked)


def call_likelihood(rng: Random, where: Path) -> None:
    """Bits per dimension of a loaded run."""
    del where
    run = _loaded()
    given: dict[str, Any] = {"method": rng.choice((*likelihoods.METHODS, value(rng)))}
    options = ("dequantisation", "trace", "num_probes", "num_steps", "tolerance", "num_times")
    given["options"] = rng.choice(
        ({rng.choice(options): value(rng)}, {rng.choice(options): value(rng)}, value(rng))
    )
    for name in ("weights", "num_images", "batch_size", "dequantiser_steps", "seed"):
        if not rng.randrange(4):
            given[name] = value(rng)
    likelihoods.measure_likelihood(run, run.dataset(), likelihoods.WantedBits(**given))


def call_build(rng: Random, where: Path) -> None:
    """A spec of something, and what it is written as."""
    del where
    config = part(rng)
    to_json(config) if rng.randrange(4) == 0 and _json(config) else None
    if rng.randrange(2):
        build(config)
    else:
        declared = rng.choice((paths.Path, Recipe, data.DataSet, int, tuple[str, ...]))
        build(rng.choice((config, value(rng))), declared, "config.part")


def _json(config: ConfigDict) -> bool:
    try:
        to_json(config)
    except TypeError:  # Objects are no JSON.
        return False
    return True


def damaged_run(rng: Random, where: Path) -> None:
    """A run whose saved config was changed by hand."""
    shutil.copytree(OLD_RUN, where / "run", symlinks=True)
    config = from_json((OLD_RUN / "config.json").read_text(), upgrade=upgrade)
    config = changed(rng, ConfigDict(config.to_dict()))
    if _json(config):
        (where / "run" / "config.json").write_text(to_json(config))
        diffjax.load(where / "run")


def call_spec(rng: Random, where: Path) -> None:
    """A description of a call, and the call."""
    del where
    target = rng.choice((paths.Cosine, solvers.ddpm, data.image_folder, descent, Recipe))
    names = ("t_min", "share", "path", "image_size", "b2", "num_steps", "junk")
    build(spec(target, **{rng.choice(names): value(rng)}))


def saved(rng: Random, where: Path) -> None:
    """A saved config, changed, and built as loading does."""
    config = digits.get_config()
    config.model = spec(Small)
    for _ in range(2):
        config = changed(rng, config)
    if _json(config):
        read = from_json(to_json(config), ("diffjax", "tests"))
        if not rng.randrange(3):
            workdirs.check_claim(where, read)
        build(rng.choice([read[key] for key in read]))


@dataclass(frozen=True)
class Program:
    """An executable, and the flags that it requires."""

    module: Any
    needs: Callable[[Path], dict[str, str]]
    config: bool = False


def _on_run(where: Path) -> dict[str, str]:
    del where
    return {"workdir": str(OLD_RUN)}


def _with_config(where: Path) -> dict[str, str]:
    return {"config": str(ROOT / "configs" / "digits.py"), "workdir": str(where / "new")}


ON_A_RUN = (
    *(
        Program(module, _on_run)
        for module in (sample, evaluate, edit, find_grid, likelihood, probe)
    ),
    Program(export, lambda where: {**_on_run(where), "out": str(where / "out")}),
    Program(reflow, lambda where: {**_on_run(where), "out": str(where / "out.npz")}),
    Program(report, lambda where: {"workdir": str(where), "out": str(where / "page")}),
    Program(validate, lambda where: {"workdirs": str(OLD_RUN)}),
)
PROGRAMS = (
    Program(train, lambda where: _with_config(where) | {"dry_run": "true"}, config=True),
    Program(train, lambda where: _with_config(where) | {"print_config": "true"}, config=True),
    Program(
        plan,
        lambda where: {
            "config": _with_config(where)["config"], "topology": "v5e:2x2", "analytic": "true"
        },
        config=True,
    ),
    *ON_A_RUN,
    Program(objectives, lambda where: {"out": str(where)}),
    Program(solvers_page, lambda where: {"out": str(where)}),
    Program(
        sweep,
        lambda where: {
            "sweep": str(ROOT / "configs" / "sweeps" / "digits_objectives.py"),
            "workdir": str(where),
            "status": "true",
        },
    ),
    Program(benchmark, lambda where: {"json": str(where / "x.json")}),
    Program(train_classifier, lambda where: {"out": str(where / "c.npz")}),
)  # fmt: skip
# With these, a program waits for processes that nobody starts.
WAITED_FOR = ("distributed", "coordinator", "num_processes", "process_index")
# And plans of searches take long.
LEFT_OUT = (
    *WAITED_FOR, "search", "startup", "engine", "largest_batch", "workers", "against", "devices",
)  # fmt: skip


def command_line(rng: Random, where: Path) -> None:
    """A program with one to three flags that mean nothing."""
    program = rng.choice(PROGRAMS)
    given: dict[str, Any] = program.needs(where)
    names = [name for name in program.module.FLAGS if name not in LEFT_OUT]
    small, settings = [], {}
    if program.config:
        settings = config_files.settings(config_files.load(given["config"]))
        names = [*rng.sample(sorted(settings), 10), *names, *names]
        model = {"hidden_size": 8, "depth": 1, "num_heads": 1}
        small = [f"--config.model.{name}={size}" for name, size in model.items()]
    for name in rng.sample(names, min(len(names), rng.choice((1, 1, 2, 3)))):
        flags = program.module.FLAGS
        known = settings[name].default if name in settings else _example(flags[name])
        given[name] = _text(rng.choice((plain(rng), alike(rng, known), alike(rng, known))))
    argv = small + [
        f"--{name}" if text is None else f"--{name}={text}" for name, text in given.items()
    ]
    if not rng.randrange(10):
        argv.append(rng.choice(WORDS))
    status = cli.run(program.module.main, program.module.FLAGS, usage="", argv=argv)
    assert status in (0, 2), f"status {status}"


def _example(flag: Any) -> Any:
    """A value of the kind that a flag takes."""
    kind = flag.flag_type()
    examples = {"int": 1, "float": 0.5, "bool": True, "comma separated list of strings": ("a",)}
    return examples.get(kind, "a")


def _text(given: Any) -> str:
    return ",".join(map(str, given)) if isinstance(given, tuple) else _number_text(given)


def _number_text(given: Any) -> str:
    return str(given) if not isinstance(given, int) or given < 10**15 else "1" + "0" * 15


KINDS: tuple[Callable[[Random, Path], None], ...] = (
    prepare, call_train, call_load, call_run, call_run, wanted, call_likelihood, call_build,
    call_build, call_spec, saved, damaged_run, command_line, command_line, command_line,
    command_line,
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """A try that did not end well.

    Attributes:
        name: its seed and number; `attempt(name)` makes it again.
        kind: what was raised where, alike for alike failures.
        text: the traceback.
    """

    name: str
    kind: str
    text: str


def attempt(name: str) -> Failure | None:
    """One try, within `without_work`; None where it ended well."""
    rng = Random(name)
    kind = rng.choice(KINDS)
    out, err = io.StringIO(), io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            kind(rng, Path(folder))
        except WorkBegins:
            return None
        except UserError as error:
            # An empty line reports nothing.
            return None if str(error).strip() else Failure(name, "empty", traceback.format_exc())
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if "/diffjax/" in frame.filename or
                   "/experiments/" in frame.filename] or frames  # fmt: skip
            place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
            told = f"{kind.__name__}: {type(error).__name__} at {place}: {str(error)[:100]}"
            return Failure(name, told, traceback.format_exc())
    return None


def attempts(seed: int | str, count: int) -> list[Failure]:
    """So many tries of a seed; those that did not end well."""
    with without_work():
        found = (attempt(f"{seed}/{i}") for i in range(count))
        return [failure for failure in found if failure is not None]


def main() -> int:
    """Makes tries; prints each kind of failure once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=20, help="of one try: longer is a hang")
    parser.add_argument("--ends", action="store_true", help="how each try ended")
    parser.add_argument("--full", action="store_true", help="whole tracebacks")
    given = parser.parse_args()

    def hangs(*args: Any) -> None:
        del args
        raise TimeoutError("hangs")

    signal.signal(signal.SIGALRM, hangs)
    kinds: dict[str, list[Failure]] = {}
    with without_work():
        for i in range(given.first, given.first + given.tries):
            signal.alarm(given.seconds)
            failure = attempt(f"{given.seed}/{i}")
            signal.alarm(0)
            if failure is not None:
                place = failure.kind.split(" at ")[-1].split(": ")[0]
                if place not in kinds:
                    text = failure.text if given.full else failure.kind
                    print(f"{failure.name} {text}", flush=True)
                kinds.setdefault(place, []).append(failure)
    for place, failures in kinds.items():
        print(f"{len(failures):4} {place}: {' '.join(f.name for f in failures[:6])}")
    print(f"{given.tries} tries, {sum(map(len, kinds.values()))} failures, {len(kinds)} places")
    return bool(kinds)


if __name__ == "__main__":
    sys.exit(main())
