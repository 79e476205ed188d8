"""The content of a comparison's report as plain data: means and intervals over training seeds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from diffjax.comparison.arms import Comparison, compare_arms
from diffjax.comparison.provenance import check_comparable
from diffjax.comparison.results import RunFiles, SweepFiles
from diffjax.comparison.side_by_side import metric_rows, own_recipes
from diffjax.comparison.verdicts import finite, mean_interval
from diffjax.errors import UserError
from diffjax.evaluation.tables import HIGHER_IS_BETTER, METRICS, is_number, range_of

RECIPE = ("solver", "grid", "num_steps", "guidance_scale", "weights")
_TARGET = "_target_"
_ERRORS = (0.0, np.inf)  # range of squared errors
_FACTS = (
    "extractor", "extractor_sha256", "resize", "codec", "codec_sha256", "value_range", "rounding",
    "reference", "reference_sha256", "labels", "num_samples", "num_reference_images",
)  # fmt: skip


def numbers(files: SweepFiles) -> dict[str, Any]:
    """All content of the report except pictures; the content of `report.json`.

    Distances with different provenance are left out, and `incomparable` is the reason.
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
        "numbers": metric_rows(files),
        "cost": cost(files, results),
        "probes": {arm: probed(files.of(arm)) for arm in files.arms},
        "config_differences": config_differences({a: files.of(a)[0].config for a in files.arms}),
        "unfinished": [_unfinished(run) for run in files.runs if run.state != "done" or run.damage],
        "left_out": [dict(one) for one in files.sweep.get("left_out") or []],
        "provenance": provenance(files.runs),
    }


def _verdict(files: SweepFiles, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The verdict by Fréchet distance for each arm, and the rule of the comparison."""
    try:
        found = compare_sweep(files, results)
    except UserError as error:
        rows = [{"arm": arm, "verdict": "not evaluated", "seeds": 0} for arm in files.arms]
        return {"rule": f"{error}.", "verdict_rows": [_plain_row(row) for row in rows]}
    rule = (
        f"Fréchet distance, lower is better. {found.rule}{_whose_noise(files, results)} Means over "
        "training seeds with Student's 95 % intervals. An arm is worse if its paired difference to "
        "the arm with the lowest mean is significant at 5 % for all pairs of arms together (Holm); "
        "this is stricter than an interval of this one difference that excludes 0. Bootstrap "
        "intervals, over training and noise seeds, are too narrow for few seeds, so verdicts do "
        "not use them"
    )
    rows = [_plain_row(row, found.own) for row in found.verdict_rows()]
    if search := files.sweep.get("search"):
        adaptive = bool(search.get("tried"))  # which only searches that learn from results record
        rule += f". {_of_search(search, len(rows), adaptive)}"
        rows = [_without_verdict(row) for row in rows] if adaptive else rows
    several = any(row["noise"] is not None for row in rows)
    rule += "; noise is the standard deviation between noise seeds." if several else "."
    return {"rule": rule, "verdict_rows": rows}


def _of_search(search: Mapping[str, Any], number: int, adaptive: bool) -> str:
    """What a search does to the result of its best trial."""
    text = (
        f"The best of {number} trials of this search ({search.get('method')}) was chosen by these "
        "numbers, so its own is optimistic: finalists with fresh seeds are compared without that "
        "bias (--finalists)"
    )
    if adaptive:
        text += ". Later trials were chosen by the results of earlier ones: there is no verdict"
    return text


def _without_verdict(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of an adaptive search: tests between arms assume that results did not choose them."""
    decided = row["mean"] is not None and not row["verdict"].startswith(("incomplete", "no value"))
    return {**row, "verdict": "chosen adaptively: no verdict"} if decided else dict(row)


def _whose_noise(files: SweepFiles, results: Mapping[str, Mapping[str, Any]]) -> str:
    """A sentence on whether each training seed was evaluated from its own noise."""
    recipes = [(results[run.name] or {}).get("sampling") or {} for run in files.runs if run.seed]
    if not any(recipes):
        return ""
    if all("noise_seed" in sampling for sampling in recipes if sampling):
        return " Each training seed has its own noise, which its arms share."
    return (
        " Training seeds were evaluated from one noise, by an earlier version, which makes "
        "verdicts overconfident: evaluate them again."
    )


def compare_sweep(files: SweepFiles, results: Mapping[str, Mapping[str, Any]]) -> Comparison:
    """Compares the arms, paired by training seed.

    Raises:
        UserError: as in `compare_arms`.
    """
    # A run without a known seed is not paired.
    seeds = {run.name: run.name if run.seed is None else run.seed for run in files.runs}
    return compare_arms(results, {run.name: run.arm for run in files.runs}, seeds=seeds)


def _plain_row(row: Mapping[str, Any], way: Any = "") -> dict[str, Any]:
    """Converts a row of a verdict to JSON.

    It has `arm, verdict, seeds, noise, recipe`, and `mean, low, high` of the arm, of the gap and of
    the bootstrap; unknown numbers are None.
    """
    plain: dict[str, Any] = {key: row[key] for key in ("arm", "verdict", "seeds")}
    for prefix, key in (("", "interval"), ("gap_", "gap"), ("bootstrap_", "bootstrap")):
        interval = row.get(key)
        for name in ("mean", "low", "high"):
            plain[f"{prefix}{name}"] = finite(getattr(interval, name)) if interval else None
    recipe = f"{way}; {row['choice']}" if "choice" in row else ""
    return {**plain, "noise": row.get("noise"), "recipe": recipe}


def quality(files: SweepFiles) -> list[dict[str, Any]]:
    """One row for each arm and recipe: metrics over seeds, and whether it is Pareto-optimal.

    Values of several noise seeds are averaged first; intervals are over training seeds.
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
                    float(np.mean(known))
                    for rows_of_run in by_run.values()
                    if (known := [r[metric] for r in rows_of_run if is_number(r.get(metric))])
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
    """Identifies a line in a plot of quality against NFE: the recipe without its steps."""
    return tuple(row.get(name) for name in RECIPE if name != "num_steps")


def pareto_front(rows: Sequence[Mapping[str, Any]], metric: str) -> list[Mapping[str, Any]]:
    """The Pareto-optimal rows in NFE and the mean of a metric, in order of NFE.

    Example:
        >>> rows = [
        ...     {"nfe": nfe, "accuracy": {"mean": mean}}
        ...     for nfe, mean in ((9, 0.8), (18, 0.9), (34, 0.85))
        ... ]
        >>> [row["nfe"] for row in pareto_front(rows, "accuracy")]
        [9, 18]
    """
    sign = -1.0 if metric in HIGHER_IS_BETTER else 1.0
    known = [row for row in rows if is_number(row["nfe"]) and metric in row]
    known.sort(key=lambda row: (row["nfe"], sign * row[metric]["mean"]))
    front: list[Mapping[str, Any]] = []
    for row in known:
        better = not front or sign * row[metric]["mean"] < sign * front[-1][metric]["mean"]
        # Rows that are equal in both are all Pareto-optimal.
        if better or _place(row, metric) == _place(front[-1], metric):
            front.append(row)
    return front


def _place(row: Mapping[str, Any], metric: str) -> tuple[float, float]:
    return row["nfe"], row[metric]["mean"]


def cost(files: SweepFiles, results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The training cost of each run, and the metrics of its own recipe.

    Args:
        files: the runs.
        results: comparable evaluations by the run's name.
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
    """The probes of an arm's runs: means over seeds, or the reason why they are missing."""
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
    """Errors by bin, with intervals over seeds for several runs, and over images for one run."""
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
    """Noise scales by bin over seeds, from means of |G|²/tr Σ, because |G|² can be near 0."""
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
    """The settings in which arms differ, with their values and the arms that have them.

    The training seed (intervals are over it) and the config's name are left out.

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
    """Flattens nested settings to dotted names; a spec's callable has the name of the spec."""
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
    """Versions, machines, revisions and the provenance of the distances, over all runs.

    Returns:
        For each fact its values, with the number of runs that have them.
    """
    facts: dict[str, dict[str, int]] = {}

    def note(name: str, value: Any) -> None:
        if value is not None and value != "":
            counts = facts.setdefault(name, {})
            counts[str(value)] = counts.get(str(value), 0) + 1

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
    # Older evaluations have the same weights for all rows.
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
    """The reason why the runs' distances can't be compared; "" if they can."""
    found = {run.name: run.evaluation for run in files.runs if run.evaluation}
    try:
        check_comparable(found, "frechet_distance")
    except UserError as error:
        return str(error)
    return ""
