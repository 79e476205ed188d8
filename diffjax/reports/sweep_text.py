"""Writes a comparison as Markdown and as CSV."""

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffjax.comparison.arms import Comparison, Standing
from diffjax.comparison.results import SweepFiles
from diffjax.comparison.side_by_side import entries, metric_table
from diffjax.comparison.summary import RECIPE
from diffjax.evaluation.tables import METRICS, MISSING, number, three_digits

COLUMNS = (
    "arm", "run", "seed", *RECIPE, "sampling_seed", "own_recipe", "nfe", *METRICS, "seconds",
    "train_steps", "train_flops_per_step", "train_seconds",
)  # fmt: skip


def as_csv(files: SweepFiles) -> str:
    """Formats one CSV line for each run and recipe, without averaging; unknown values are empty.

    The line of a run's own recipe has all its metrics in further columns.
    """
    out = io.StringIO()
    numbers = {run.name: entries(run) for run in files.runs}
    others = sorted({name for found in numbers.values() for name in found} - set(METRICS))
    writer = csv.DictWriter(out, [*COLUMNS, *others], lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for run in files.runs:
        shared = {
            "arm": run.arm,
            "run": run.name,
            "seed": run.seed,
            "weights": run.evaluation.get("weights"),
            "train_steps": run.evaluation.get("step"),
            "train_flops_per_step": run.run.get(
                "train_flops_per_step", run.cell.get("flops_per_step")
            ),
            "train_seconds": run.run.get("train_seconds"),
        }
        for row in run.evaluation.get("by_nfe") or []:
            own = {name: value for name, value in row.items() if name != "seed"}
            sampled = row.get("seed", (run.evaluation.get("sampling") or {}).get("seed"))
            line = {**shared, **own, "sampling_seed": sampled, "seed": run.seed}
            if _is_own(row, run.evaluation):
                line |= {name: numbers[run.name].get(name, {}).get("value") for name in others}
                line["own_recipe"] = "yes"
            writer.writerow(line)
    return out.getvalue()


def as_markdown(content: Mapping[str, Any], commands: Mapping[str, Any]) -> str:
    """Formats the text and tables of the report as Markdown, without plots and pictures."""
    parts = [f"# {_safe(content['name'])}"]
    if content["question"]:
        parts.append(_safe(content["question"]))
    if content["incomparable"]:
        parts.append(f"Not compared: {_safe(content['incomparable'])}")
    parts += [verdict_markdown(content["verdict_rows"]), _safe(content["rule"])]
    if content["quality"]:
        parts += ["## Quality against NFE", _quality(content["quality"])]
    if content["numbers"]:
        parts += ["## All metrics at the runs' own recipes", *_numbers(content)]
    parts += ["## Training", _cost(content["cost"])]
    if content["config_differences"]:
        parts += ["## Settings that differ", _differences(content["config_differences"])]
    if content["unfinished"] or content["left_out"]:
        parts += ["## Failed and left out", _failures(content)]
    made = [line for line in (commands["sweep"], commands["report"]) if line]
    parts += [
        "## How to make it again",
        "\n".join(f"    {' '.join(line.split())}" for line in made),
    ]
    facts = [
        [name, ", ".join(value if len(v) == 1 else f"{value} ({n} runs)" for value, n in v.items())]
        for name, v in content["provenance"].items()
    ]
    parts.append(_table(["fact", "value"], facts))
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def written(one: Mapping[str, Any] | None, key: str = "") -> str:
    """Formats a mean and its interval as `mean (low to high)`; for one seed only the mean."""
    if one is None:
        return MISSING
    mean, low, high = (one.get(f"{key}{name}") for name in ("mean", "low", "high"))
    if mean is None:
        return MISSING
    return (
        three_digits(mean)
        if low is None
        else f"{three_digits(mean)} ({three_digits(low)} to {three_digits(high)})"
    )


def common_recipe(recipes: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Splits recipes into their common part and the remaining part of each.

    Example:
        >>> common_recipe(["heun, NFE 17; uniform grid", "heun, NFE 17; karras grid", ""])
        ('heun, NFE 17', {'heun, NFE 17; uniform grid': 'uniform grid', \
'heun, NFE 17; karras grid': 'karras grid'})
    """
    parts = {
        # Runs of one arm may have different recipes, which are not split.
        recipe: [recipe] if "; or " in recipe else re.split("[,;] ", recipe)
        for recipe in recipes
        if recipe
    }
    first = next(iter(parts.values()), [])
    common = [part for part in first if all(part in own for own in parts.values())]
    rest = {
        recipe: ", ".join(part for part in own if part not in common)
        for recipe, own in parts.items()
    }
    return ", ".join(common), rest


def recipes_sentence(recipes: Mapping[str, str]) -> str:
    """Describes how the samples of each arm were drawn, without a full stop.

    Example:
        >>> recipes_sentence({"flow": "heun, uniform grid", "edm": "heun, karras grid"})
        'heun; uniform grid: flow; karras grid: edm'
    """
    common, rest = common_recipe(recipes.values())
    arms: dict[str, list[str]] = {}
    for arm, recipe in recipes.items():
        if recipe and rest[recipe]:
            arms.setdefault(rest[recipe], []).append(arm)
    own = [f"{recipe}: {', '.join(names)}" for recipe, names in arms.items()]
    return "; ".join([common, *own] if common else own)


def verdict_markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """Formats the verdict as a Markdown table.

    Args:
        rows: the `verdict_rows` of `diffjax.comparison.summary.numbers`.
    """
    heading = ["arm", "mean, 95 %", "95 % by bootstrap", "noise", "minus the best", "verdict"]
    cells = [
        [
            row["arm"],
            written(row),
            written(row, "bootstrap_") if row["bootstrap_low"] is not None else MISSING,
            three_digits(row["noise"]),
            written(row, "gap_"),
            row["verdict"],
            row["recipe"],
        ]
        for row in rows
    ]
    return _table([*heading, "recipe"], cells)


def quality_markdown(comparison: Comparison) -> str:
    """Formats means over training seeds as Markdown: a row per solver and NFE, a column per arm.

    Example:
        >>> from diffjax.comparison.arms import compare_arms
        >>> row = {"solver": "ddim", "grid": "uniform", "num_steps": 9, "nfe": 9}
        >>> result = {"weights": "live", "by_nfe": [{**row, "frechet_distance": 0.5}]}
        >>> print(quality_markdown(compare_arms({"run": result}, {"run": "flow"})))
        | solver | NFE | flow |
        | --- | --- | --- |
        | ddim | 9 | 0.500 |
    """
    standings = comparison.standings
    arms = list(dict.fromkeys(arm for found in standings.values() for arm in found))
    cells = [
        [way.solver, number(way.nfe), *(_with_ends(found.get(arm)) for arm in arms)]
        for way, found in standings.items()
    ]
    return _table(["solver", "NFE", *arms], cells)


def _with_ends(standing: Standing | None) -> str:
    """Both ends, since an interval ends where the number can't be, as below a distance of 0."""
    if standing is None:
        return MISSING
    mean, low, high = standing.interval
    return written({"mean": mean, "low": low if high < math.inf else None, "high": high})


def _quality(rows: Sequence[Mapping[str, Any]]) -> str:
    metrics = [name for name in METRICS if any(name in row for row in rows)]
    heading = ["arm", "solver", "grid", "steps", "guidance", "weights", "NFE"]
    cells = [
        [
            row["arm"],
            *(number(row[name]) for name in RECIPE),
            number(row["nfe"]),
            *(written(row.get(name)) for name in metrics),
            "yes" if row["pareto"] else "",
        ]
        for row in rows
    ]
    return _table([*heading, *(METRICS[name].label for name in metrics), "Pareto front"], cells)


def _numbers(content: Mapping[str, Any]) -> list[str]:
    """The recipes of the samples, the table, and the reasons for metrics that are not compared."""
    recipes, rows = content["own_recipes"], content["numbers"]
    arms = list(recipes)
    reasons = dict.fromkeys(row["incomparable"] for row in rows if row["incomparable"])
    return [
        _safe(f"Drawn by {recipes_sentence(recipes)}."),
        _table(["", *arms, "floor"], metric_table(rows, arms)),
        *(_safe(f"Not compared: {reason}.") for reason in reasons),
    ]


def _is_own(row: Mapping[str, Any], evaluation: Mapping[str, Any]) -> bool:
    """Whether a row of quality by NFE belongs to the run's own recipe."""
    sampling = evaluation.get("sampling") or {}
    own = {**sampling, "grid": sampling.get("grid_name"), "weights": evaluation.get("weights")}
    keys = ("solver", "grid", "num_steps", "guidance_scale", "weights", "seed")
    return all(row.get(key, own.get(key)) == own.get(key) for key in keys)


def _cost(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [
            row["run"],
            *(number(row[key]) for key in ("train_steps", "train_flops", "train_seconds")),
            three_digits(row["frechet_distance"]),
        ]
        for row in rows
    ]
    return _table(["run", "steps", "FLOPs", "seconds", "Fréchet distance"], cells)


def _differences(found: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [
            one["setting"],
            MISSING if value["value"] is None else str(value["value"]),
            ", ".join(value["arms"]),
        ]
        for one in found
        for value in one["values"]
    ]
    return _table(["setting", "value", "arms"], cells)


def _failures(content: Mapping[str, Any]) -> str:
    cells = [[row["name"], row["state"], row["error"]] for row in content["unfinished"]]
    cells += [[one.get("name"), "left out", one.get("reason")] for one in content["left_out"]]
    return _table(["run", "state", "why"], cells)


def _table(heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(_safe(str(cell)) for cell in line)} |" for line in lines)


def _safe(text: str) -> str:
    """Escapes text from files, so that it is one line of plain text in Markdown."""
    text = " ".join(text.split())
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|")):
        text = text.replace(character, entity)
    return text
