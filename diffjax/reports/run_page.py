"""Writes the report of a run as one self-contained HTML page.

It depends only on the files of the run's folder, so it can be made again at any time, and equal
files make equal pages.
"""

import base64
import io
import shlex
import statistics
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, UndefinedError
from markupsafe import Markup
from PIL import Image

from diffjax.comparison.provenance import check_comparable
from diffjax.errors import UserError
from diffjax.evaluation.tables import (
    METRICS,
    duration,
    is_number,
    label,
    number,
    percent,
    quality_cells,
    quality_table,
    sorted_rows,
    three_digits,
)
from diffjax.host.files import write_whole
from diffjax.host.run_files import read_json, read_metrics
from diffjax.reports import plots
from diffjax.reports.plan_figure import of_plan

__all__ = ["quality_table", "write_report"]

_MAX_GRIDS = 7
_MAX_PIXELS = 64_000_000
_TARGET = "_target_"
_COUNTS = ("num_samples", "num_reference_images", "num_floor_images")
_SHOWN_ELSEWHERE = (
    "command",
    "versions",
    "num_params",
    "num_trained_params",
    "device",
    "host",
    "train_seconds",
    "compile_seconds",
    "init_from",
    "changes",
    "best",
)


def write_report(workdir: str | Path) -> Path:
    """Writes `report.html` from the files of a run's folder.

    The page is self-contained, with images and plots inside. For missing files, the page shows the
    command that makes them.

    Args:
        workdir: with any of `config.json`, `run.json`, `metrics.jsonl`, `evaluation.json`,
            `plan.json`, `samples/step_*.png` and `samples/neighbours.png`.

    Returns:
        The path of the page.

    Raises:
        UserError: the folder does not exist, or one of its files is invalid.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"there is no run in {workdir}: python -m experiments.train makes one")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "percent": percent, "duration": duration}
    source = resources.files("diffjax.reports").joinpath("templates/run_page.html.jinja")
    template = environment.from_string(source.read_text(encoding="utf-8"))
    try:
        page = template.render(_content(workdir))
    except UserError:
        raise
    # JSON with an unexpected structure can fail in any of these ways.
    except (
        ArithmeticError, AttributeError, LookupError, TypeError, ValueError, UndefinedError,
    ) as error:  # fmt: skip
        raise UserError(
            f"a file in {workdir} is not what a run writes ({type(error).__name__}: {error}): "
            "evaluate it again by python -m experiments.evaluate, or restore it"
        ) from error
    path = workdir / "report.html"
    write_whole(path, page)
    return path


def _content(workdir: Path) -> dict[str, Any]:
    """The content of the page's template."""
    config = read_json(workdir / "config.json") or {}
    run = read_json(workdir / "run.json") or {}
    evaluation = read_json(workdir / "evaluation.json") or {}
    records = read_metrics(workdir / "metrics.jsonl")
    plan = read_json(workdir / "plan.json")
    commands = _commands(workdir, run)
    step = records[-1]["step"] if records else None
    return {
        "name": workdir.resolve().name,
        "verdict": _verdict(config, evaluation, step),
        "settings": _settings(config, run, records),
        "grids": _sample_grids(workdir / "samples"),
        "begins_with_weights": "init_from" in run,
        "prompts": config.get("sample_prompts") or [],
        "loss_curve": Markup(plots.loss_curve(records)),
        "loss_by_log_snr": Markup(plots.plot_loss_by_log_snr(records)),
        "metric_curves": _metric_curves(run, records),
        "step_curves": _step_curves(_comparable_steps(workdir, evaluation)),
        "foreign": evaluation.get("samples"),
        "evaluation": evaluation,
        "evaluated_with": _evaluated_with(evaluation),
        "quality": _quality(evaluation),
        "neighbours_image": embedded_image(workdir / "samples" / "neighbours.png"),
        "neighbours": {
            name: value
            for name, value in _flat(evaluation.get("neighbours")).items()
            if not name.startswith("provenance.")
        },
        "numbers": _numbers(evaluation),
        "config": config,
        "commands": commands,
        "plan": None if plan is None else of_plan(plan),
        "run": _flat({k: v for k, v in run.items() if k not in _SHOWN_ELSEWHERE}),
        "versions": _flat(run.get("versions")),
    }


def _metric_curves(
    run: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> list[tuple[str, Any]]:
    """Title and figure of each metric that evaluators measured."""
    best = run.get("best") or {}
    drawn = {
        name: plots.metric_curve(
            records, name, best.get("step") if name == best.get("metric") else None
        )
        for name in plots.metric_names(records)
    }
    return [(plots.metric_title(name), Markup(svg)) for name, svg in drawn.items() if svg]


def _comparable_steps(
    workdir: Path, evaluation: Mapping[str, Any]
) -> list[tuple[int, Mapping[str, Any]]]:
    """The evaluations of several steps by the same recipe, weights and provenance, by step."""
    step: Any = evaluation.get("step")
    if not is_number(step):
        return []
    found = {step: evaluation}
    for path in sorted(workdir.glob("evaluation_*.json")):
        other = read_json(path) or {}
        drawn_alike = all(other.get(key) == evaluation.get(key) for key in ("weights", "sampling"))
        if drawn_alike and is_number(other.get("step")) and _are_comparable(evaluation, other):
            found.setdefault(other["step"], other)
    return sorted(found.items())


def _are_comparable(*evaluations: Mapping[str, Any]) -> bool:
    try:
        check_comparable(dict(zip("ab", evaluations, strict=True)), "frechet_distance")
    except UserError:
        return False
    return True


def _step_curves(steps: Sequence[tuple[int, Mapping[str, Any]]]) -> list[tuple[str, Any]]:
    """Title and figure of each metric of evaluations against the training step; [] of one step."""
    if len(steps) < 2:
        return []
    drawn = {
        name: plots.metric_curve(
            [
                {"step": step, f"{plots.EVAL_PREFIX}evaluation/{name}": _value(each.get(name))}
                for step, each in steps
                if is_number(_value(each.get(name)))
            ],
            f"evaluation/{name}",
        )
        for name in ("frechet_distance", "kernel_distance", "accuracy", "precision", "recall")
    }
    return [(label(name), Markup(svg)) for name, svg in drawn.items() if svg]


def _value(entry: Any) -> Any:
    return entry.get("value") if isinstance(entry, Mapping) else entry


def _best(best: Mapping[str, Any] | None) -> str:
    """Which checkpoint is the best.

    Example:
        >>> _best({"metric": "samples/frechet_distance", "step": 1200, "value": 1.234})
        'step 1,200, Fréchet distance (samples) 1.23'
    """
    if not best:
        return ""
    title = plots.metric_title(best["metric"])
    return f"step {number(best['step'])}, {title} {three_digits(best['value'])}"


def _verdict(config: Mapping[str, Any], evaluation: Mapping[str, Any], step: int | None) -> str:
    """One sentence on the quality of the samples, and on the progress of training."""
    num_steps = config.get("num_steps")
    if not evaluation:
        if step is None:
            return "Not trained yet."
        of = f" of {num_steps:,}" if is_number(num_steps) else ""
        return f"Trained to step {step:,}{of}; not evaluated yet."
    parts = []
    kind = "samples of other code" if "samples" in evaluation else "conditional samples"
    samples = f"{number(evaluation.get('num_samples'))} {kind}"
    if is_number(evaluation.get("accuracy")):
        parts.append(f"{percent(evaluation['accuracy'])} of {samples} recognised")
    distance = evaluation.get("frechet_distance")
    if isinstance(distance, Mapping):
        floor = _floor(evaluation, "frechet_distance")
        floor = "" if floor is None else f" (floor {three_digits(floor)})"
        parts.append(f"Fréchet distance {three_digits(distance.get('value'))}{floor}")
    verdict = "; ".join(parts) or "Evaluated, without accuracy or Fréchet distance"
    if "samples" in evaluation and not is_number(evaluation.get("accuracy")):
        verdict += f" of {samples}"
    nfe = (evaluation.get("sampling") or {}).get("nfe")
    if is_number(nfe):
        verdict += f" at {nfe:,} NFE"
    evaluated = evaluation.get("step")
    if is_number(evaluated) and is_number(num_steps) and evaluated < num_steps:  # type: ignore[operator]
        verdict += f", after {evaluated:,} of {num_steps:,} training steps"
    return f"{verdict}."


def _settings(
    config: Mapping[str, Any], run: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Rows of the two tables of settings (parts, sizes): kind, name, hyper-parameters."""
    parts = (
        ("Data", config.get("data")),
        ("Codec", _find(config, "codec")),
        ("Objective", config.get("objective")),
        ("Path", config.get("path")),
        ("Target", _find(config, "target")),
        ("Noise label", _find(config, "noise_label")),
        ("Weight", _find(config, "weight")),
        ("Times", _find(config, "times")),
        ("Network", config.get("model")),
        ("Guidance", _find(config.get("sampling"), "guidance")),
        ("Optimizer", config.get("optimizer")),
        ("Update rule", _find(config.get("optimizer"), "rule")),
        ("Schedule", _find(config, "schedule")),
    )
    rows = [(what, *_describe(part)) for what, part in parts if part is not None]
    trained = f"{records[-1]['step']:,} of " if records else ""
    speeds = [r["images_per_second"] for r in records if is_number(r.get("images_per_second"))]
    seconds, compiling = run.get("train_seconds"), duration(run.get("compile_seconds"))
    plain = (
        ("Parameters", number(run.get("num_params")), run.get("num_params")),
        ("Trained of these", _trained(config, run), _trained(config, run) or None),
        ("Steps", trained + number(config.get("num_steps")), config.get("num_steps")),
        ("Batch", f"{number(config.get('batch_size'))} images", config.get("batch_size")),
        ("Seed", str(config.get("seed")), config.get("seed")),
        ("Best checkpoint", _best(run.get("best")), run.get("best")),
        ("Begins with", _beginning(run.get("init_from") or {}), run.get("init_from")),
        ("Device", str(run.get("device")), run.get("device")),
        ("Host", str(run.get("host")), run.get("host")),
        ("Wall time", f"{duration(seconds)} training, {compiling} compiling", seconds),
        ("Speed", f"{number(statistics.median(speeds or [0]))} images/s", speeds or None),
    )
    sizes = [(what, text, "") for what, text, value in plain if value is not None]
    changed = [
        (f"Changed at step {number(entry['step'])}", "; ".join(entry["lines"]), "")
        for entry in run.get("changes", ())
    ]
    return rows, sizes + changed


def _trained(config: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """How many parameters are trained, and which; "" where all are.

    Example:
        >>> lora = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "layers": "*attention*"}
        >>> _trained({"lora": lora, "trainable": "final_*"}, {"num_trained_params": 4096})
        '4,096: LoRA of rank 8, alpha 16, dropout 0, of *attention*; final_*'
    """
    lora, others = config.get("lora") or {}, config.get("trainable")
    which = []
    if rank := lora.get("rank"):
        alpha = lora.get("alpha") or rank
        which.append(
            f"LoRA of rank {rank}, alpha {alpha:g}, dropout {lora.get('dropout'):g}, "
            f"of {lora.get('layers')}"
        )
    which += [others] if others else []
    return f"{number(run.get('num_trained_params'))}: {'; '.join(which)}" if which else ""


def _beginning(source: Mapping[str, Any]) -> str:
    """Which weights a run began with.

    Example:
        >>> _beginning({"folder": "runs/a", "weights": "live", "step": 1200, "sha256": "0123abcd"})
        'runs/a, weights live, step 1,200, SHA-256 0123abcd'
        >>> _beginning({"file": "a.pt", "left_out": "learned variance", "sha256": "0123abcd"})
        'a.pt, without learned variance, SHA-256 0123abcd'
    """
    step = f"step {number(source['step'])}" if "step" in source else ""
    weights = f"weights {source['weights']}" if "weights" in source else ""
    place = source.get("folder") or source.get("file") or ""
    without = f"without {source['left_out']}" if "left_out" in source else ""
    sha256 = f"SHA-256 {source.get('sha256', '')[:8]}"
    return ", ".join(filter(None, (place, weights, without, step, sha256)))


def _describe(part: Any) -> tuple[str, str]:
    """The name of a spec's callable, and its hyper-parameters as one line."""
    if not isinstance(part, Mapping):
        return str(part), ""
    name = str(part.get(_TARGET, "")).rpartition(":")[2]
    values = [
        f"{key} {_listed(value)}"
        for key, value in part.items()
        if key != _TARGET and not isinstance(value, Mapping)
    ]
    return name, " · ".join(values)


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _find(tree: Any, key: str) -> Any:
    """The value of `key` at the lowest depth in a tree; None if it is absent."""
    level = [tree]
    while level:
        nodes = [node for node in level if isinstance(node, Mapping)]
        for node in nodes:
            if key in node:
                return node[key]
        level = [child for node in nodes for child in node.values()]
    return None


def _sample_grids(folder: Path) -> list[tuple[int, Any]]:
    """At most seven (step, image) pairs, evenly spaced over training, including both ends."""
    found = {}
    for path in folder.glob("step_*.png"):
        digits = path.stem.removeprefix("step_")
        if digits.isdecimal():
            found[int(digits)] = path
    steps = sorted(found)
    if len(steps) > _MAX_GRIDS:
        last = len(steps) - 1
        steps = [steps[round(i * last / (_MAX_GRIDS - 1))] for i in range(_MAX_GRIDS)]
    return [(step, embedded_image(found[step])) for step in steps]


def embedded_image(path: Path) -> dict[str, Any] | None:
    """Encodes a PNG for an `<img>` element; None if the file does not exist."""
    if not path.exists():
        return None
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            width, height = image.size
            if width * height > _MAX_PIXELS:
                raise Image.DecompressionBombError(f"{width}×{height} pixels")
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} is not a readable PNG: delete it, and make the report again"
        ) from error
    data = base64.b64encode(content).decode("ascii")
    return {"source": f"data:image/png;base64,{data}", "width": width, "height": height}


def _evaluated_with(evaluation: Mapping[str, Any]) -> str:
    """Two sentences: the weights and the recipe of the evaluation, and the accuracy."""
    named = {
        "weights": evaluation.get("weights"),
        "training step": evaluation.get("step"),
    }
    names = {"num_steps": "solver steps", "nfe": "NFE", "guidance_scale": "guidance scale"}
    sampling = evaluation.get("sampling") or {}
    named |= {names.get(key, key): value for key, value in sampling.items()}
    drawn = evaluation.get("samples") or {}
    named |= {"file": drawn.get("file"), "SHA-256": drawn.get("sha256")} if drawn else {}
    text = ", ".join(f"{key} {number(value)}" for key, value in named.items() if value is not None)
    kind = "samples of other code" if drawn else "samples"
    sentences = [f"Measured on {number(evaluation.get('num_samples'))} {kind}: {text}."]
    interval, classifier = (
        evaluation.get(key) for key in ("accuracy_interval", "classifier_test_accuracy")
    )
    if is_number(evaluation.get("accuracy")) and isinstance(interval, list):
        low, high = map(percent, interval)
        sentences.append(
            f"Accuracy {percent(evaluation['accuracy'])}, 95 % interval {low} to {high}; the "
            f"classifier's accuracy on real test images is {percent(classifier)}."
        )
    return " ".join(sentences)


def _quality(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Figures and table of quality against NFE."""
    rows = sorted_rows(evaluation.get("by_nfe") or [])
    columns, cells = quality_cells(rows)
    drawn = [
        (metric.label, plots.quality_against_nfe(rows, _floor(evaluation, name), name))
        for name, metric in METRICS.items()
    ]
    return {
        "figures": [(label, Markup(svg)) for label, svg in drawn if svg],
        "headings": [column.heading for column in columns],
        "cells": cells,
    }


def _floor(evaluation: Mapping[str, Any], metric: str) -> float | None:
    measure = evaluation.get(metric)
    floor = measure.get("floor") if isinstance(measure, Mapping) else None
    return floor if is_number(floor) else None


def _numbers(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """A row for each metric with a provenance, and the facts that all of them share."""
    entries = {
        name: entry
        for name, entry in evaluation.items()
        if isinstance(entry, Mapping) and "provenance" in entry and "value" in entry
    }
    known = [_flat(entry["provenance"]) for entry in entries.values()]
    shared = {
        fact: value
        for fact, value in (known[0] if known else {}).items()
        if fact not in _COUNTS and all(facts.get(fact) == value for facts in known)
    }
    rows = [
        {
            "name": label(name),
            "value": _with_error(entry, "value", "standard_error"),
            "floor": _with_error(entry, "floor", "floor_standard_error"),
            # A score that uses no real images has no count of them.
            "counts": [number(facts.get(count) or None) for count in _COUNTS],
            "how": " · ".join(
                f"{fact.replace('_', ' ')} {value}" if fact != "definition" else str(value)
                for fact, value in facts.items()
                if fact not in shared and fact not in _COUNTS
            ),
        }
        for (name, entry), facts in zip(entries.items(), known, strict=True)
    ]
    return {"rows": rows, "shared": shared}


def _with_error(entry: Mapping[str, Any], key: str, error: str) -> str:
    text = three_digits(entry.get(key))
    return f"{text} ± {entry[error]:#.2g}" if is_number(entry.get(error)) else text


def _commands(workdir: Path, run: Mapping[str, Any]) -> dict[str, str]:
    """The commands that train, evaluate and sample this run."""
    quoted = shlex.quote(workdir.as_posix())
    train = run.get("command")
    if isinstance(train, list):
        train = shlex.join(map(str, train))
    return {
        "train": train or f"python -m experiments.train --config=CONFIG.py --workdir={quoted}",
        "evaluate": f"python -m experiments.evaluate --workdir={quoted}",
        "sample": f"python -m experiments.sample --workdir={quoted} --out=grid.png",
    }


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted names."""
    if not isinstance(tree, Mapping):
        return {}
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _listed(value) if isinstance(value, list) else value
    return flat
