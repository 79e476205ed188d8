"""Arms of a sweep held against each other, each at its best by one stated rule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from diffjax.errors import UserError
from diffjax.evaluation.provenance import check_comparable
from diffjax.evaluation.tables import is_number, measure
from diffjax.evaluation.verdicts import (
    Difference,
    Interval,
    differences,
    mean_interval,
    verdict_of,
)

Results = Mapping[str, Mapping[str, Any]]


class Way(NamedTuple):
    """How samples are drawn, and what one costs; what a row of the table is."""

    solver: str
    num_steps: int
    nfe: int

    def __str__(self):
        return f"{self.solver}, {self.num_steps} steps, NFE {self.nfe}"


class Choice(NamedTuple):
    """What is chosen for each arm and way by itself: it ranks arms anew and costs the same."""

    grid: str
    guidance_scale: float
    weights: str

    def __str__(self):
        return f"{self.grid} grid, guidance {self.guidance_scale:g}, {self.weights}"


class Standing(NamedTuple):
    """One arm at one way.

    Attributes:
        choice: that the rule chose, the same for all training seeds.
        values: a number for each training seed, the mean over the noise seeds that are reported.
        noise: the standard deviation that another noise seed makes, pooled over the training seeds;
            None if one alone is reported.
        interval: of the mean.
    """

    choice: Choice
    values: tuple[float, ...]
    noise: float | None
    interval: Interval


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        metric: the number compared; less is better.
        rule: how each arm's grid, guidance scale and weights were chosen, in a sentence.
        standings: by way and arm, from few evaluations to many.
        counts: of each arm, how many of its runs are evaluated, and how many there are; only whole
            arms have verdicts.
        own: the way that the runs themselves are judged by; where they have none in common, the
            dearest that all arms have.
        level: of intervals and verdicts.
    """

    metric: str
    rule: str
    standings: Mapping[Way, Mapping[str, Standing]]
    counts: Mapping[str, tuple[int, int]]
    own: Way
    level: float = 0.95

    def verdict_rows(self, way: Way | None = None) -> list[dict[str, Any]]:
        """A row an arm, best first, then those without a number.

        Args:
            way: the runs' own by default.

        Returns:
            For each `arm, verdict, seeds`, and where it was measured `interval, noise, choice`, as
            of its `Standing`, and `gap`, the interval of what it is more than the best arm.
        """
        standings = self.standings[way or self.own]
        ranked = sorted(standings, key=lambda arm: standings[arm].interval.mean)
        whole = {a: standings[a].values for a in ranked if self.counts[a][0] == self.counts[a][1]}
        several = len(whole) > 1 and min(map(len, whole.values())) > 1
        pairs = differences(whole, self.level) if several else {}
        leader = next(iter(whole), "")
        rows = []
        for arm in ranked:
            found = pairs.get((leader, arm))
            rows.append(
                {
                    "arm": arm,
                    "verdict": self._verdict(arm, leader if several else "", found),
                    "seeds": len(standings[arm].values),
                    **standings[arm]._asdict(),
                    "gap": found and _negative(found.interval),
                }
            )
        others = [arm for arm in self.counts if arm not in standings]
        return rows + [{"arm": arm, "verdict": "not evaluated", "seeds": 0} for arm in others]

    def _verdict(self, arm: str, leader: str, found: Difference | None) -> str:
        evaluated, runs = self.counts[arm]
        if evaluated < runs:
            return f"not compared: {evaluated} of {runs} seeds evaluated"
        if found:
            return verdict_of(found)
        if arm == leader:
            return "leads"
        return "one seed: no verdict" if len(self.counts) > 1 else "nothing to compare it with"


def _negative(interval: Interval) -> Interval:
    return Interval(-interval.mean, -interval.high, -interval.low)


def compare(
    results: Results, arms: Mapping[str, str], metric: str = "frechet_distance"
) -> Comparison:
    """Compares arms at each way of drawing samples that they share.

    Grid, guidance scale and weights re-rank arms, so where a run was evaluated with several, each
    arm has its own best: those of least mean over the training seeds, measured with the first
    noise seed. What is reported is measured with the other noise seeds, so that choosing does not
    flatter. Without a choice, or a second noise seed, each run is sampled as its config says, and
    all noise seeds are reported.

    Args:
        results: the content of each run's `evaluation.json`, by the run's name; None or missing
            where there is none yet.
        arms: the arm of each run, by the run's name; runs of one arm differ in their seed alone
            and come in the same order of seeds in each arm.
        metric: a number of the rows `by_nfe`; less is better.

    Raises:
        UserError: numbers measured in unlike ways, or none.
    """
    have = {name: results[name] for name in arms if results.get(name)}
    check_comparable(have, metric)
    rows = {name: _rows(result, metric) for name, result in have.items()}
    names: dict[str, list[str]] = {}
    for name, arm in arms.items():
        names.setdefault(arm, []).append(name)
    seeds = sorted({row[1] for found in rows.values() for at in found.values() for row in at})
    offered = [{choice for choice, _ in at} for found in rows.values() for at in found.values()]
    several = any(len(choices) > 1 for choices in offered)
    if several and len(seeds) < 2:
        rows = {name: _with_its_own(found, have[name]) for name, found in rows.items()}
    chosen_by, reported = (seeds[:1], seeds[1:]) if several and len(seeds) > 1 else ([], seeds)
    ways = {way for found in rows.values() for way in found}
    standings: dict[Way, dict[str, Standing]] = {}
    for way in sorted(ways, key=lambda way: (way.solver, way.nfe)):
        for arm, runs in names.items():
            numbers = [rows.get(name, {}).get(way) for name in runs]
            standing = _standing(numbers, chosen_by, reported)
            if standing:
                standings.setdefault(way, {})[arm] = standing
    if not standings:
        raise UserError(f"there is no {metric.replace('_', ' ')} of any run to compare")
    own = {way for result in have.values() if (way := _own(result)) in standings}
    shared = [way for way, found in standings.items() if len(found) == len(names)]
    dearest = max(shared or standings, key=lambda way: way.nfe)
    return Comparison(
        metric,
        _rule(chosen_by, reported, metric, several),
        standings,
        {arm: (sum(name in have for name in runs), len(runs)) for arm, runs in names.items()},
        own.pop() if len(own) == 1 else dearest,
    )


def _rows(result: Mapping[str, Any], metric: str) -> dict[Way, dict[tuple[Choice, int], float]]:
    """A run's numbers by way, then by choice and noise seed."""
    found: dict[Way, dict[tuple[Choice, int], float]] = {}
    for row in result["by_nfe"]:
        way = Way(row["solver"], row["num_steps"], row["nfe"])
        # Rows of before weights and seeds were in them have the run's own.
        weights = row.get("weights", result.get("weights", ""))
        choice = Choice(row["grid"], float(row.get("guidance_scale", 1.0)), weights)
        seed = row.get("seed", result.get("sampling", {}).get("seed", 0))
        value = row.get(metric)
        found.setdefault(way, {})[choice, seed] = value if is_number(value) else np.nan
    return found


def _with_its_own(
    found: Mapping[Way, Mapping[tuple[Choice, int], float]], result: Mapping[str, Any]
) -> dict[Way, dict[tuple[Choice, int], float]]:
    """A run's numbers with the grid, guidance scale and weights of its config alone."""
    sampling = result.get("sampling", {})
    grid, scale = sampling.get("grid_name"), sampling.get("guidance_scale")
    own = (grid, scale, result.get("weights", ""))
    kept = {
        way: {key: value for key, value in at.items() if key[0] == own} for way, at in found.items()
    }
    return {way: at for way, at in kept.items() if at}


def _standing(
    runs: Sequence[Mapping[tuple[Choice, int], float] | None],
    chosen_by: Sequence[int],
    reported: Sequence[int],
) -> Standing | None:
    """An arm at one way, from its runs' numbers; None if one can't be had."""
    found = [run for run in runs if run]
    if not found:
        return None
    offered = sorted({choice for run in found for choice, _ in run})

    def mean(choice: Choice, seeds: Sequence[int]) -> float:
        values = [run.get((choice, seed), np.nan) for run in found for seed in seeds]
        return float(np.mean(values)) if np.isfinite(values).all() else np.inf

    best = min(offered, key=lambda choice: mean(choice, chosen_by)) if chosen_by else offered[0]
    values = np.array([[run.get((best, seed), np.nan) for seed in reported] for run in found])
    if not np.isfinite(values).all():
        return None
    noise = None
    if len(reported) > 1:
        noise = float(np.sqrt(np.mean(np.var(values, axis=1, ddof=1))))
    means = values.mean(axis=1).tolist()
    return Standing(best, tuple(means), noise, mean_interval(means))


def _rule(chosen_by: Sequence[int], reported: Sequence[int], metric: str, several: bool) -> str:
    name, noise = metric.replace("_", " "), ", ".join(map(str, reported))
    if chosen_by:
        return (
            f"Each arm has the grid, guidance scale and weights of its least mean {name} with "
            f"noise seed {chosen_by[0]}; what is reported is measured with noise seed {noise}."
        )
    rule = f"Each run is sampled as its config says, with noise seed {noise}."
    if several:
        rule += (
            " Its other grids, guidance scales and weights do not count: to choose among them "
            "fairly takes a second noise seed, config.evaluation.seeds=(0, 1)."
        )
    return rule


def _own(result: Mapping[str, Any]) -> Way:
    sampling = result.get("sampling", {})
    return Way(*(sampling.get(key, 0) for key in Way._fields))


def verdict_markdown(comparison: Comparison, way: Way | None = None) -> str:
    """The verdict as a Markdown table.

    Example:
        >>> row = {"solver": "ddim", "grid": "uniform", "num_steps": 9, "nfe": 9,
        ...        "guidance_scale": 1.0, "weights": "live", "seed": 0}
        >>> values = {"a": (0.50, 0.61, 0.55), "b": (0.91, 1.00, 0.95)}
        >>> results = {f"{arm}{seed}": {"by_nfe": [{**row, "frechet_distance": value}]}
        ...            for arm, found in values.items() for seed, value in enumerate(found)}
        >>> print(verdict_markdown(compare(results, {name: name[0] for name in results})))
        | arm | verdict | mean, 95 % interval | seeds | less the best |
        |---|---|---|---|---|
        | a | leads | 0.553 (0.417 to 0.690) | 3 |  |
        | b | worse | 0.953 (0.841 to 1.07) | 3 | 0.400 (0.375 to 0.425) |
        <BLANKLINE>
    """
    rows = comparison.verdict_rows(way)
    unlike = len({row.get("choice") for row in rows}) > 1
    head = ["arm", "verdict", "mean, 95 % interval", "seeds", "less the best"]
    lines = [[*head, "chosen"] if unlike else head]
    for row in rows:
        mean, gap = (written(row[key]) if row.get(key) else "" for key in ("interval", "gap"))
        cells = [row["arm"], row["verdict"], mean, str(row["seeds"]), gap]
        lines.append([*cells, str(row.get("choice", ""))] if unlike else cells)
    return _markdown(lines)


def quality_markdown(comparison: Comparison) -> str:
    """A Markdown table: a row a way, a column an arm; means over training seeds.

    Example:
        >>> row = {"solver": "ddim", "grid": "uniform", "num_steps": 9, "nfe": 9}
        >>> result = {"weights": "live", "by_nfe": [{**row, "frechet_distance": 0.5}]}
        >>> print(quality_markdown(compare({"run": result}, {"run": "flow"})))
        | solver | steps | NFE | flow |
        |---|---|---|---|
        | ddim | 9 | 9 | 0.500 |
        <BLANKLINE>
    """
    arms = list(dict.fromkeys(arm for found in comparison.standings.values() for arm in found))
    lines = [["solver", "steps", "NFE", *arms]]
    for way, found in comparison.standings.items():
        cells = [_cell(found[arm]) if arm in found else "–" for arm in arms]
        lines.append([way.solver, f"{way.num_steps:,}", f"{way.nfe:,}", *cells])
    return _markdown(lines)


def _cell(standing: Standing) -> str:
    text = measure(standing.interval.mean)
    if len(standing.values) < 2:
        return text
    return f"{text} ± {measure(standing.interval.high - standing.interval.mean)}"


def written(interval: Interval) -> str:
    """`mean (low to high)`; of one value, itself."""
    mean, low, high = (measure(value) for value in interval)
    return f"{mean} ({low} to {high})" if np.isfinite(interval.low) else mean


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    written = [f"| {' | '.join(line)} |\n" for line in lines]
    return "".join([written[0], "|---" * len(lines[0]) + "|\n", *written[1:]])
