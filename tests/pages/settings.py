"""Writes docs/settings.md: every setting of a config, with its default, its range and its meaning.

python -m tests.pages.settings
"""

import ast
import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import (
    Annotated,
    Any,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from ml_collections import ConfigDict

from diffjax import choices, settings
from diffjax.data import Augment, idx, sources, tfds
from diffjax.data.image_folders import captions, folder
from diffjax.data.latents import latents
from diffjax.defaults import experiment
from diffjax.evaluation.extractors import features
from diffjax.kinds import Range
from diffjax.models.families import LAYOUTS
from diffjax.models.low_rank import LoraLayers
from diffjax.sampling.sample import Recipe
from diffjax.spec import TARGET, as_spec, spec, spec_at
from diffjax.training.nonfinite import NonFinite

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
AGAIN = "run python -m tests.pages.settings"

HEAD = """# Settings

Every setting of a config: its default, what it may be, and what it means. Each is a flag, by its
dotted name: `--config.optimizer.learning_rate=3e-4`. Parts are chosen by their axis, after the
colon of `--config` (`--config=digits:optimizer=muon,path=cosine`); a part then has the defaults
listed here, and a config file may have others: `diffjax train --config=FILE --print_config`
prints those of a config. [configs.md](configs.md) explains all of it.
`python -m tests.pages.settings` writes this page from the declarations, and a test
compares them.

"""

TABLES: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    # Heading: where it is in a config, the axis, the choices.
    "Data": ("data", "", {}),
    "Augmentation": ("augment", "", {"": spec(Augment)}),
    "Codecs of latents": ("data.codec", "codec", choices.CODECS),
    "Paths (noise schedules)": ("path", "path", choices.PATHS),
    "Prediction targets": ("precond.target", "target", choices.TARGETS),
    "Noise labels (time or noise conditioning)": (
        "precond.noise_label", "noise_label", choices.NOISE_LABELS,
    ),
    "Scales of the input (c_in)": ("precond.input_scale", "input_scale", choices.INPUT_SCALES),
    "Objectives": ("objective", "loss", choices.LOSSES),
    "Loss weights": ("objective.weight", "weight", choices.WEIGHTS),
    "Densities of training times": ("objective.times", "times", choices.TIMES),
    "Random numbers behind the times": ("objective.uniforms", "uniforms", choices.UNIFORMS),
    "Couplings": ("objective.coupling", "coupling", choices.COUPLINGS),
    "Wrappers": ("wrappers[0]", "wrappers", choices.WRAPPERS),
    "Optimizers": ("optimizer", "optimizer", choices.OPTIMIZERS),
    "Update rules": (
        "optimizer.rule", "", {name: row["rule"] for name, row in choices.OPTIMIZERS.items()},
    ),
    "Schedules of the learning rate": ("optimizer.schedule", "schedule", choices.SCHEDULES),
    "Losses that are not finite": ("nonfinite", "", {"": spec(NonFinite)}),
    "LoRA": ("lora", "", {"": spec(LoraLayers)}),
    "The recipe of samples": ("sampling", "", {"": spec(Recipe)}),
    "Solvers": ("sampling.solver", "", choices.SOLVERS),
    "Time grids": ("sampling.grid", "", choices.GRIDS),
    "Guidance": ("sampling.guidance", "", choices.GUIDANCE),
    "Negative or guiding models": ("sampling.against", "", choices.AGAINST),
    "Metrics during training": ("evaluators.NAME", "evaluators", choices.EVALUATORS),
    "Features of distances": ("evaluation.extractor", "", {}),
    "Networks": ("model", "model", {}),
}  # fmt: skip
DATA = (
    sources.digits, idx.fashion_mnist, idx.mnist, tfds.tfds_images, folder.image_folder,
    captions.captioned_folder, latents,
)  # fmt: skip
EXTRACTORS = (
    features.classifier_features, features.pixel_features,
)  # fmt: skip


def general() -> str:
    """The table of settings that every config has."""
    config = experiment(
        "NAME",
        "",
        data=ConfigDict(),
        extractor=ConfigDict(),
        models=choices.MODELS_8X8,
        model="dit",
    )
    rows = _of_group(settings.Settings, config, "config")
    return "## Every config\n\n" + _table(rows)


def _of_group(group: Any, values: Any, name: str) -> Iterator[tuple[str, str, str, str]]:
    about = _attribute_docstrings()[group.__name__]
    for key, kind in get_type_hints(group, include_extras=True).items():
        kind = get_args(kind)[0] if get_origin(kind) is NotRequired else kind
        if is_typeddict(kind):
            yield f"{name}.{key}", "", "", about[key]
            yield from _of_group(kind, values.get(key, {}), f"{name}.{key}")
        else:
            part = isinstance(values.get(key), ConfigDict) or kind is settings.Spec
            default = "" if part or key not in values else _value(values[key])
            yield f"{name}.{key}", default, "a part, below" if part else allowed(kind), about[key]


def _attribute_docstrings() -> dict[str, dict[str, str]]:
    """The strings below the fields of `diffjax.settings`."""
    found = {}
    for group in ast.parse(inspect.getsource(settings)).body:
        if isinstance(group, ast.ClassDef):
            pairs = zip(group.body, group.body[1:], strict=False)
            found[group.name] = {
                field.target.id: str(text.value.value)
                for field, text in pairs
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            }
    return found


def parts(heading: str) -> str:
    """A section: its choices, then the settings of each."""
    place, axis, table = TABLES[heading]
    text = f"## {heading}\n\n`config.{place}`"
    specs: dict[str, ConfigDict] = {
        name: spec_at(row) if isinstance(row, str) else row for name, row in table.items()
    }
    specs |= {"Data": _specs(DATA), "Features of distances": _specs(EXTRACTORS)}.get(heading, {})
    if heading == "Networks":
        specs = _networks()
    by_callable: dict[str, list[str]] = {}
    for name, row in specs.items():
        by_callable.setdefault(row[TARGET], []).append(name)
    if axis and table:
        text += f", axis `{axis}`"
    text += "\n\n"
    plain = []
    for location, names in by_callable.items():
        target = _at(location)
        first = _first_sentence(target)
        called = ", ".join(f"`{name}`{_others(target, specs[name])}" for name in names if name)
        rows = list(_of_callable(target))
        title = called or f"`{target.__name__}`"
        if rows:
            text += f"**{title}** (`{location}`). {first}\n\n{_table(rows)}"
        else:
            plain.append(f"- {title}: {first}\n")
    return text + ("".join(plain) + "\n" if plain else "")


def _others(target: Any, row: ConfigDict) -> str:
    """The settings of a choice that differ from the defaults of its callable."""
    own = {name: _value(as_spec(default)) for name, default in _defaults(target).items()}
    values = {name: _value(value) for name, value in row.items() if name != TARGET}
    texts = [f"{name}={text.strip('`')}" for name, text in values.items() if own.get(name) != text]
    return f" ({', '.join(texts)})" if texts else ""


def _specs(callables: Iterable[Callable]) -> dict[str, ConfigDict]:
    return {
        one.__name__: ConfigDict({TARGET: f"{one.__module__}:{one.__qualname__}"})
        for one in callables
    }


def _networks() -> dict[str, ConfigDict]:
    """The classes of networks, and the names by which configs choose them."""
    found = {name: row for name, row in choices.MODELS_8X8.items() if name in ("dit", "unet")}
    known = {row[TARGET] for row in found.values()}
    for layouts in LAYOUTS.values():
        family = next(iter(layouts.values()))
        for name in list(family.sizes)[:1]:
            network: Any = family.size(name)
            kind = type(getattr(network, "network", network))
            location = f"{kind.__module__}:{kind.__qualname__}"
            if location not in known:
                known.add(location)
                found[kind.__name__] = ConfigDict({TARGET: location})
    return found


def _at(location: str) -> Any:
    module, _, name = location.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _of_callable(target: Any) -> Iterator[tuple[str, str, str, str]]:
    kinds, about = get_type_hints(target, include_extras=True), _described(target)
    for name, default in _defaults(target).items():
        if not (name == "name" and "parent" in _defaults(target)) and name != "parent":
            yield name, _value(as_spec(default)), allowed(kinds.get(name, Any)), about.get(name, "")


def _defaults(target: Any) -> dict[str, Any]:
    """Those of a callable; arguments without one are passed when a program is made."""
    parameters = inspect.signature(target).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def _described(target: Any) -> dict[str, str]:
    """Meanings by name, from arguments and attributes in the docstrings of it and its bases."""
    found: dict[str, str] = {}
    bases = reversed(inspect.getmro(target)) if inspect.isclass(target) else [target]
    for one in bases:
        text = inspect.cleandoc(one.__doc__ or "")
        for section in re.findall(_SECTION, text, re.MULTILINE):
            for names, about in re.findall(_ENTRY, section, re.MULTILINE):
                for name in re.split(r"[^\w]+(?:and )?", names):
                    found[name] = " ".join(about.split())
    return found


_SECTION = r"^(?:Args|Attributes)\b[^\n]*(?:\n\S[^\n]*)?:\n((?:(?:    .*)?\n?)+)"
_ENTRY = r"^    \*{0,2}([\w`, ]+?): (.*(?:\n      +.*)*)"


def _first_sentence(target: Any) -> str:
    lines = (inspect.getdoc(target) or "").splitlines()
    return lines[0] if lines else ""


def allowed(kind: Any) -> str:
    """What a setting may be, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        ranges = [mark for mark in inner[1:] if isinstance(mark, Range)]
        whole = "whole, " if inner[0] is int else ""
        return f"{whole}{ranges[0]}" if ranges else allowed(inner[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(allowed, inner)))
    if origin is tuple:
        return f"list: {allowed(inner[0])}" if len(inner) == 2 and inner[1] is ... else "list"
    plain = {
        int: "whole", float: "number", bool: "true, false", str: "text", type(None): "none",
        Any: "",
    }  # fmt: skip
    if kind in plain:
        return plain[kind]
    if origin is Mapping:
        return "numbers by name"
    return f"a {getattr(kind, '__name__', 'part')}" if inspect.isclass(kind) else "a part"


def _value(value: Any) -> str:
    if isinstance(value, ConfigDict):
        return f"`{value[TARGET].partition(':')[2]}`" if TARGET in value else ""
    if isinstance(value, tuple) and any(isinstance(item, ConfigDict) for item in value):
        return ", ".join(map(_value, value))
    if isinstance(value, str):
        return f"`{value}`" if value else "empty"
    if callable(value):
        return f"`{getattr(value, '__name__', type(value).__name__)}`"
    return "none" if value is None else f"`{value}`"


def _table(rows: Iterable[tuple[str, str, str, str]]) -> str:
    lines = ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
    for name, *cells in rows:
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def page() -> str:
    """The text of the page."""
    return HEAD + general() + "".join(map(parts, TABLES)).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
