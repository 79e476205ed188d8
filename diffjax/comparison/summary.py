"""What a comparison's page says, as plain data: means over training seeds with their intervals."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from diffjax.comparison.arms import Comparison, compare
from diffjax.comparison.provenance import check_comparable
from diffjax.comparison.results import RunFiles, SweepFiles
from diffjax.comparison.side_by_side import all_numbers, own_recipes
from diffjax.comparison.verdicts import finite, mean_interval
from diffjax.errors import UserError
from diffjax.evaluation.tables import METRICS, is_number, range_of

RECIPE = ("solver", "grid", "num_steps", "guidance_scale", "weights")
_TARGET = "_target_"
_ERRORS = (0.0, np.inf)  # where squared errors can be
_FACTS = (
    "extractor", "extractor_sha256", "resize", "autoencoder", "value_range", "rounding",
    "reference", "reference_sha256", "labels", "num_samples", "num_reference_images",
)  # fmt: skip


def numbers(files: SweepFiles) -> dict[str, Any]:
    """Everything but pictures that the page shows; what `report.json` holds.

    Distances that were measured in unlike ways are left out, and `incomparable` says why.
    """
    incomparable = _incomparable(files)
    results = {run.name: {} if incomparable else run.evaluation for run in files.runs}
    return {
        "name": files.name,
        "question": str(files.sweep.get("question") or ""),
        "incomparable": incomparable,
        **_verdict(files, results),
        "quality": [] if incomparable else quality(files),
        "own_recipes": own_recipes(files),
        "numbers": all_numbers(files),
        "cost": cost(files, results),
        "probes": {arm: probed(files.of(arm)) for arm in files.arms},
        "config_differences": config_differences({a: files.of(a)[0].config for a in files.arms}),
        "unfinished": [_unfinished(run) for run in files.runs if run.state != "done" or run.damage],
        "left_out": [dict(one) for one in files.sweep.get("left_out") or []],
        "provenance": provenance(files.runs),
    }


def _verdict(files: SweepFiles, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Which arm leads by the Fréchet distance, how sure that is, and by what rule."""
    try:
        found = compared(files, results)
    except UserError as error:
        rows = [{"arm": arm, "verdict": "not evaluated", "seeds": 0} for arm in files.arms]
        return {"rule": f"{error}.", "verdict_rows": [_plain_row(row) for row in rows]}
    rule = (
        f"Fréchet distance, lower is better. {found.rule}{_whose_noise(files, results)} Means over "
        "training seeds with Student's 95 % intervals; an arm is worse when its differences to the "
        "one of least mean, seed by seed, are decided at 5 % for all pairs of arms together "
        "(Holm), which asks for more than that the interval of this one difference is beyond 0. "
        "Bootstrap intervals, over training and noise seeds, are too narrow for few seeds, and no "
        "verdict is by them"
    )
    rows = [_plain_row(row, found.own) for row in found.verdict_rows()]
    several = any(row["noise"] is not None for row in rows)
    rule += "; noise is the deviation that another noise seed makes." if several else "."
    return {"rule": rule, "verdict_rows": rows}


def _whose_noise(files: SweepFiles, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether training seeds have noise of their own, as evaluations have it that say which."""
    told = [(results[run.name] or {}).get("sampling") or {} for run in files.runs if run.seed]
    if not any(told):
        return ""
    if all("noise_seed" in sampling for sampling in told if sampling):
        return " Each training seed has noise of its own, which its arms share."
    return (
        " Training seeds were evaluated from one noise, by an earlier version, which makes "
        "verdicts too sure: evaluate them again."
    )


def compared(files: SweepFiles, results: Mapping[str, Mapping[str, Any]]) -> Comparison:
    """The arms held against each other, paired by training seed.

    Raises:
        UserError: as `compare`.
    """
    # A run whose seed is not known is no other one's pair.
    seeds = {run.name: run.name if run.seed is None else run.seed for run in files.runs}
    return compare(results, {run.name: run.arm for run in files.runs}, seeds=seeds)


def _plain_row(row: Mapping[str, Any], way: Any = "") -> dict[str, Any]:
    """A row of a verdict as JSON: `arm, verdict, seeds, recipe`, and `mean, low, high` and the same
    of the gap and of the bootstrap, None where a number is not known.
    """
    plain: dict[str, Any] = {key: row[key] for key in ("arm", "verdict", "seeds")}
    for prefix, key in (("", "interval"), ("gap_", "gap"), ("bootstrap_", "bootstrap")):
        interval = row.get(key)
        for name in ("mean", "low", "high"):
            plain[f"{prefix}{name}"] = finite(getattr(interval, name)) if interval else None
    recipe = f"{way}; {row['choice']}" if "choice" in row else ""
    return {**plain, "noise": row.get("noise"), "recipe": recipe}


def quality(files: SweepFiles) -> list[dict[str, Any]]:
    """A row for each arm and recipe: its metrics over seeds, and whether nothing beats it.

    Values of several sampling seeds are averaged first: the interval is over training seeds.
    """
    rows = []
    for arm in files.arms:
        found: dict[tuple[Any, ...], dict[str, list[Mapping[str, Any]]]] = {}
        for run in files.of(arm):
            for row in _rows(run):
                key = tuple(_plain(row.get(name)) for name in RECIPE)
                found.setdefault(key, {}).setdefault(run.name, []).append(row)
        for key, by_run in found.items():
            values = {
                metric: [
                    float(np.mean(seen))
                    for rows_of_run in by_run.values()
                    if (seen := [r[metric] for r in rows_of_run if is_number(r.get(metric))])
                ]
                for metric in ("nfe", "seconds", *METRICS)
            }
            metrics = {m: _interval(values[m], range_of(m)) for m in METRICS if values[m]}
            rows.append(
                {
                    "arm": arm,
                    **dict(zip(RECIPE, key, strict=True)),
                    "nfe": _mean(values["nfe"]),
                    "seconds": _mean(values["seconds"]),
                    "runs": len(by_run),
                    **metrics,
                }
            )
    rows.sort(key=lambda r: (files.arms.index(r["arm"]), *map(str, family(r)), r["nfe"] or 0))
    front = [id(row) for row in pareto_front(rows, "frechet_distance")]
    return [{**row, "pareto": id(row) in front} for row in rows]


def family(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a line of quality against NFE: the recipe without its number of steps."""
    return tuple(row.get(name) for name in RECIPE if name != "num_steps")


def pareto_front(rows: Sequence[Mapping[str, Any]], metric: str) -> list[Mapping[str, Any]]:
    """The rows that no other row beats in both NFE and the mean of a metric, by NFE.

    Example:
        >>> rows = [
        ...     {"nfe": nfe, "accuracy": {"mean": mean}}
        ...     for nfe, mean in ((9, 0.8), (18, 0.9), (34, 0.85))
        ... ]
        >>> [row["nfe"] for row in pareto_front(rows, "accuracy")]
        [9, 18]
    """
    sign = -1.0 if METRICS[metric].higher_is_better else 1.0
    known = [row for row in rows if is_number(row["nfe"]) and metric in row]
    known.sort(key=lambda row: (row["nfe"], sign * row[metric]["mean"]))
    front: list[Mapping[str, Any]] = []
    for row in known:
        better = not front or sign * row[metric]["mean"] < sign * front[-1][metric]["mean"]
        # Rows that are equal in both do not beat each other.
        if better or _place(row, metric) == _place(front[-1], metric):
            front.append(row)
    return front


def _place(row: Mapping[str, Any], metric: str) -> tuple[float, float]:
    return row["nfe"], row[metric]["mean"]


def cost(files: SweepFiles, results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each run's training cost, and how good its own recipe came out.

    Args:
        files: the runs.
        results: the evaluations whose numbers may stand side by side, by the run's name.
    """
    rows = []
    for run in files.runs:
        per_step = run.run.get("train_flops_per_step", run.cell.get("flops_per_step"))
        step = run.evaluation.get("step")
        flops = per_step * step if is_number(per_step) and is_number(step) else None
        seconds = run.run.get("train_seconds")
        rows.append(
            {
                "arm": run.arm,
                "run": run.name,
                "seed": run.seed,
                "train_steps": step if is_number(step) else None,
                "train_flops": flops,
                "train_seconds": seconds if is_number(seconds) else None,
                **{metric: _value(results[run.name].get(metric)) for metric in METRICS},
            }
        )
    return rows


def _value(entry: Any) -> float | None:
    value = entry.get("value") if isinstance(entry, Mapping) else entry
    return value if is_number(value) else None


def probed(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """What was probed of an arm's runs: means over seeds, or why it is missing."""
    return {
        "loss_by_log_snr": _section(runs, "loss_by_log_snr", _losses),
        "effective_weight": _section(runs, "effective_weight", lambda found: found[0]),
        "gradient_noise": _section(runs, "gradient_noise", _noise),
    }


def _section(runs: Sequence[RunFiles], name: str, merge: Any) -> dict[str, Any]:
    found = [run.probes.get(name) for run in runs if run.probes]
    reasons = [
        str(one["left_out"]) for one in found if isinstance(one, Mapping) and "left_out" in one
    ]
    measured = [one for one in found if isinstance(one, Mapping) and "left_out" not in one]
    if not measured:
        return {"left_out": reasons[0] if reasons else "not measured"}
    return merge(measured)


def _losses(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Errors by bin: over seeds with several runs, over images with one."""
    edges = found[0]["log_snr_edges"]
    same = [one for one in found if one["log_snr_edges"] == edges]
    spaces = {}
    for space in same[0]["spaces"]:
        columns = zip(*(one["spaces"][space]["by_log_snr"] for one in same), strict=True)
        spaces[space] = [
            _over_images(bins[0]) if len(bins) == 1
            else _interval([b["mean"] for b in bins], _ERRORS) if all(bins) else None
            for bins in columns
        ]  # fmt: skip
    return {"log_snr_edges": edges, "runs": len(same), "spaces": spaces}


def _over_images(estimate: Mapping[str, float] | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    mean, error = estimate["mean"], estimate["standard_error"]
    low, high = max(mean - 1.96 * error, _ERRORS[0]), mean + 1.96 * error
    return {"mean": mean, "low": low, "high": high, "values": [mean]}


def _noise(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ratios of means over seeds: of |G|², which may be near 0, and of tr Σ."""
    edges = found[0]["log_snr_edges"]
    same = [one for one in found if one["log_snr_edges"] == edges]
    bins = []
    for column in zip(*(one["bins"] for one in same), strict=True):
        known = [one for one in column if one is not None]
        if not known:
            bins.append(None)
            continue
        if len(known) == 1:
            bins.append({key: known[0][key] for key in ("scale", "low", "high")})
            continue
        square = _interval([one["squared_norm"] / one["trace"] for one in known])
        bins.append(
            {
                key: 1.0 / square[of] if is_number(square[of]) and square[of] > 0 else None
                for key, of in (("scale", "mean"), ("low", "high"), ("high", "low"))
            }
        )
    return {"log_snr_edges": edges, "runs": len(same), "bins": bins}


def config_differences(configs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings in which arms differ, each with its values and the arms that have them.

    The seed of training is left out, which is what intervals are over, and the config's name.

    Example:
        >>> config_differences({"a": {"x": 1, "y": {"z": 2}}, "b": {"x": 1, "y": {"z": 3}}})
        [{'setting': 'y.z', 'values': [{'value': 2, 'arms': ['a']}, {'value': 3, 'arms': ['b']}]}]
    """
    flat = {arm: _flat(config) for arm, config in configs.items() if config}
    found = []
    for key in dict.fromkeys(key for settings in flat.values() for key in settings):
        values: dict[str, dict[str, Any]] = {}
        for arm, settings in flat.items():
            value = settings.get(key)
            values.setdefault(repr(value), {"value": value, "arms": []})["arms"].append(arm)
        if len(values) > 1 and key not in ("seed", "name"):
            found.append({"setting": key, "values": list(values.values())})
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names; what a spec calls goes under the name of the spec."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            if _TARGET in value:
                flat[f"{prefix}{key}"] = str(value[_TARGET]).rpartition(":")[2]
            rest = {name: inner for name, inner in value.items() if name != _TARGET}
            flat |= _flat(rest, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def provenance(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Versions, machine, revision and what the distances were measured with, over all runs.

    Returns:
        By fact, its values, each with the number of runs that have it.
    """
    facts: dict[str, dict[str, int]] = {}

    def note(name: str, value: Any) -> None:
        if value is not None and value != "":
            seen = facts.setdefault(name, {})
            seen[str(value)] = seen.get(str(value), 0) + 1

    for run in runs:
        for name in ("git_revision", "device", "host"):
            note(name.replace("_", " "), run.run.get(name))
        for name, version in (run.run.get("versions") or {}).items():
            note(str(name), version)
        data = run.run.get("data") or {}
        note("data", data.get("name"))
        note("training images", data.get("train_sha256"))
        distance = run.evaluation.get("frechet_distance")
        measured = distance.get("provenance") if isinstance(distance, Mapping) else None
        for name in _FACTS:
            note(name.replace("_", " "), (measured or {}).get(name))
        note("probed on test images", run.probes.get("num_images"))
    return facts


def _unfinished(run: RunFiles) -> dict[str, Any]:
    error = str(run.status.get("error") or "")
    return {
        "name": run.name,
        "state": run.state,
        "attempts": run.status.get("attempts"),
        "error": "; ".join([*([error] if error else []), *run.damage]),
    }


def _rows(run: RunFiles) -> Iterable[Mapping[str, Any]]:
    rows = run.evaluation.get("by_nfe")
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        return []
    weights = run.evaluation.get("weights")
    # Evaluations of before weights were an axis have one set of them for all rows.
    return [{"weights": weights, **row} for row in rows]


def _interval(
    values: Sequence[float], bounds: tuple[float, float] = (-np.inf, np.inf)
) -> dict[str, Any]:
    interval = mean_interval(values, bounds=bounds)
    return {
        **{key: finite(value) for key, value in interval._asdict().items()},
        "values": list(values),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _incomparable(files: SweepFiles) -> str:
    """Why the runs' distances can't stand side by side, or ""."""
    found = {run.name: run.evaluation for run in files.runs if run.evaluation}
    try:
        check_comparable(found, "frechet_distance")
    except UserError as error:
        return str(error)
    return ""
