"""Compares the arms of a sweep, each with its best sampling setting, selected by a stated rule."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from diffjax.comparison.provenance import check_comparable
from diffjax.comparison.verdicts import (
    ConfidenceInterval,
    Difference,
    bootstrap_interval,
    mean_interval,
    paired_differences,
    verdict_of,
)
from diffjax.errors import UserError
from diffjax.evaluation.tables import is_number, label, range_of

Results = Mapping[str, Mapping[str, Any]]


class Way(NamedTuple):
    """A solver and the largest NFE per sample: one row of the table.

    Attributes:
        solver: name of the solver.
        nfe: largest number of network evaluations per sample.
    """

    solver: str
    nfe: int

    def __str__(self):
        return f"{self.solver}, NFE {self.nfe}"


class SamplingSetting(NamedTuple):
    """The sampling setting that is selected separately for each arm and way.

    Attributes:
        grid: name of the time grid.
        guidance_scale: guidance scale; 1 is off.
        weights: name of the weights, `live` or an average.
    """

    grid: str
    guidance_scale: float
    weights: str


class Choice(NamedTuple):
    """A setting with the number of steps that the way's NFE allows; guidance halves it."""

    num_steps: int
    setting: SamplingSetting

    def __str__(self):
        grid, scale, weights = self.setting
        return f"{self.num_steps} steps, {grid} grid, guidance {scale:g}, {weights}"


class Drawn(NamedTuple):
    """The metric of one run at one setting and NFE: values by noise seed."""

    num_steps: int
    values: dict[int, float]


# By solver and setting, then by NFE per sample.
Table = Mapping[tuple[str, SamplingSetting], Mapping[int, Drawn]]


class Standing(NamedTuple):
    """The result of one arm at one way.

    Attributes:
        choice: the setting that the rule selected, the same for all training seeds.
        values: value for each training seed, the mean over the reported noise seeds.
        training_seeds: the training seeds of the values.
        missing: number of training seeds without a finite value.
        noise: standard deviation between noise seeds, pooled over the training seeds; None if only
            one noise seed is reported.
        interval: Student's interval of the mean, over the training seeds.
        bootstrap: bootstrap interval of the mean, over training seeds and noise seeds.
    """

    choice: Choice
    values: tuple[float, ...]
    training_seeds: tuple[Hashable, ...]
    missing: int
    noise: float | None
    interval: ConfidenceInterval
    bootstrap: ConfidenceInterval


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_arms`.

    Attributes:
        metric: name of the compared metric; lower is better.
        rule: a sentence that explains how grid, guidance scale and weights were selected.
        standings: results by way and arm, in order of increasing NFE.
        counts: for each arm, its number of evaluated runs and of all runs; only complete arms have
            verdicts.
        own: the way of the runs' own recipe; if the runs have different ones, the way with the
            largest NFE that all arms have.
        level: confidence level of intervals and verdicts.
    """

    metric: str
    rule: str
    standings: Mapping[Way, Mapping[str, Standing]]
    counts: Mapping[str, tuple[int, int]]
    own: Way
    level: float = 0.95

    def verdict_rows(self, way: Way | None = None) -> list[dict[str, Any]]:
        """One row for each arm, best first; arms without a value come last.

        Args:
            way: the way to compare at; the runs' own by default.

        Returns:
            For each arm `arm, verdict, seeds`; for measured arms also the fields of `Standing`, and
            `gap`, the interval of its difference from the best arm. An arm leads if at least one
            other arm is significantly worse.
        """
        standings = self.standings[way or self.own]
        ranked = sorted(standings, key=lambda arm: standings[arm].interval.mean)
        whole = {
            arm: dict(zip(standings[arm].training_seeds, standings[arm].values, strict=True))
            for arm in ranked
            if self.counts[arm][0] == self.counts[arm][1] and not standings[arm].missing
        }
        pairs = paired_differences(whole, self.level)
        leader = next(iter(whole), "")
        rows = []
        for arm in ranked:
            found = pairs.get((leader, arm))
            compared = [pairs[pair].decided for pair in pairs if leader in pair]
            if arm == leader and compared:
                verdict = "leads" if any(compared) else "lowest mean, nothing decided"
            else:
                verdict = self._verdict(arm, standings, whole, found)
            rows.append(
                {
                    "arm": arm,
                    "verdict": verdict,
                    "seeds": len(standings[arm].values),
                    **standings[arm]._asdict(),
                    "gap": found and _negative(found.interval),
                }
            )
        return rows + [
            {"arm": arm, "verdict": "no value" if evaluated else "not evaluated", "seeds": 0}
            for arm, (evaluated, _) in self.counts.items()
            if arm not in standings
        ]

    def _verdict(
        self,
        arm: str,
        standings: Mapping[str, Standing],
        whole: Mapping[str, Mapping[Hashable, float]],
        found: Difference | None,
    ) -> str:
        """The verdict of an arm that is not the best of several complete arms."""
        (evaluated, runs), missing = self.counts[arm], standings[arm].missing
        if evaluated < runs:
            return f"incomplete: {evaluated} of {runs} seeds evaluated"
        if missing:
            return f"no value for {missing} of {runs} seeds: no verdict"
        if found:
            return verdict_of(found)
        if len(whole) == 1:
            return "nothing to compare it with"
        if len(whole[arm]) == 1:
            return "one seed: no verdict"
        return "no two seeds in common: no verdict"


def _negative(interval: ConfidenceInterval) -> ConfidenceInterval:
    return ConfidenceInterval(-interval.mean, -interval.high, -interval.low)


def compare_arms(
    results: Results,
    arms: Mapping[str, str],
    metric: str = "frechet_distance",
    *,
    seeds: Mapping[str, Hashable] | None = None,
) -> Comparison:
    """Compares arms at each way (solver and NFE) that they share.

    Grid, guidance scale and weights can change the ranking of arms. So if runs were evaluated with
    several, each arm gets its best ones: those with the lowest mean over the training seeds,
    measured with the first noise seed. The reported values are measured with the other noise seeds,
    so the selection does not bias them. All arms have the same NFE per sample: guidance doubles
    the evaluations of a step, so it has half the steps. An NFE lower by up to a tenth counts as
    equal, because exact equality with and without guidance is impossible for solvers with several
    evaluations per step. If there is nothing to select, or only one noise seed, each run is
    sampled with its own config, and all noise seeds are reported.

    Args:
        results: content of each run's `evaluation.json`, by the run's name; None or missing if
            there is none yet.
        arms: the arm of each run, by the run's name; runs of one arm differ only in their seed.
        metric: a metric of the rows `by_nfe`; lower is better.
        seeds: the training seed of each run, by which arms are paired; by default the position
            of the run among those of its arm.

    Raises:
        UserError: provenances differ, there is no common noise seed, or no value at all.
    """
    have = {name: results[name] for name in arms if results.get(name)}
    check_comparable(have, metric)
    tables = {name: _table(result, metric) for name, result in have.items()}
    names: dict[str, list[str]] = {}
    for name, arm in arms.items():
        names.setdefault(arm, []).append(name)
    drawn = [
        one for table in tables.values() for by_nfe in table.values() for one in by_nfe.values()
    ]
    noise_seeds = sorted(set.intersection(*(set(one.values) for one in drawn))) if drawn else []
    if drawn and not noise_seeds:
        raise UserError(
            "the runs were evaluated without a common noise seed: evaluate all with the same --seed"
        )
    ways = {
        Way(solver, nfe) for t in tables.values() for (solver, _), at in t.items() for nfe in at
    }
    several = any(len(_at(table, way)) > 1 for table in tables.values() for way in ways)
    if several and len(noise_seeds) < 2:
        tables = {name: _with_its_own(table, have[name]) for name, table in tables.items()}
    chooses = several and len(noise_seeds) > 1
    chosen_by, reported = (noise_seeds[:1], noise_seeds[1:]) if chooses else ([], noise_seeds)
    standings: dict[Way, dict[str, Standing]] = {}
    for way in sorted(ways):
        for arm, runs in names.items():
            at = {
                i if seeds is None else seeds[name]: _at(tables.get(name, {}), way)
                for i, name in enumerate(runs)
            }
            standing = _standing(at, chosen_by, reported, range_of(metric))
            if standing:
                standings.setdefault(way, {})[arm] = standing
    if not standings:
        raise UserError(f"no run has a {label(metric)} to compare")
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


def _table(result: Mapping[str, Any], metric: str) -> Table:
    """The metric of a run, by solver, setting and NFE."""
    found: dict[tuple[str, SamplingSetting], dict[int, Drawn]] = {}
    for row in result["by_nfe"]:
        # Older rows do not state weights and seeds: they have the run's own.
        weights = row.get("weights", result.get("weights", ""))
        setting = SamplingSetting(row["grid"], float(row.get("guidance_scale", 1.0)), weights)
        seed = row.get("seed", result.get("sampling", {}).get("seed", 0))
        at = found.setdefault((row["solver"], setting), {})
        value = row.get(metric)
        values = at.setdefault(row["nfe"], Drawn(row["num_steps"], {})).values
        values[seed] = value if is_number(value) else np.nan
    return found


def _at(table: Table, way: Way) -> dict[Choice, dict[int, float]]:
    """The values of each setting with the largest NFE that a way allows, within a tenth."""
    found = {}
    for (solver, setting), by_nfe in table.items():
        affordable = [nfe for nfe in by_nfe if 0.9 * way.nfe <= nfe <= way.nfe]
        if solver == way.solver and affordable:
            num_steps, values = by_nfe[max(affordable)]
            found[Choice(num_steps, setting)] = values
    return found


def _with_its_own(table: Table, result: Mapping[str, Any]) -> Table:
    """The part of a run's table with the grid, guidance scale and weights of its own config."""
    sampling = result.get("sampling", {})
    grid, scale = sampling.get("grid_name"), sampling.get("guidance_scale")
    own = SamplingSetting(grid, scale, result.get("weights", ""))
    return {key: by_nfe for key, by_nfe in table.items() if key[1] == own}


def _standing(
    runs: Mapping[Hashable, Mapping[Choice, Mapping[int, float]]],
    chosen_by: Sequence[int],
    reported: Sequence[int],
    bounds: tuple[float, float],
) -> Standing | None:
    """The result of an arm at one way, from the values of its runs; None without values."""
    found = {seed: run for seed, run in runs.items() if run}
    if not found:
        return None
    offered = sorted({choice for run in found.values() for choice in run})

    def values_of(choice: Choice, seeds: Sequence[int]) -> np.ndarray:
        return np.array(
            [[run.get(choice, {}).get(seed, np.nan) for seed in seeds] for run in found.values()]
        )

    def mean(choice: Choice) -> float:
        values = values_of(choice, chosen_by)
        return float(values.mean()) if np.isfinite(values).all() else np.inf

    best = min(offered, key=mean) if chosen_by else offered[0]
    values = values_of(best, reported)
    known = [bool(np.isfinite(row).all()) for row in values]
    if not any(known) or (chosen_by and np.isinf(mean(best))):
        return None
    values = values[known]
    noise = None
    if len(reported) > 1:
        noise = float(np.sqrt(np.mean(np.var(values, axis=1, ddof=1))))
    means = values.mean(axis=1).tolist()
    return Standing(
        best,
        tuple(means),
        tuple(seed for seed, is_known in zip(found, known, strict=True) if is_known),
        known.count(False),
        noise,
        mean_interval(means, bounds=bounds),
        bootstrap_interval(values),
    )


def _rule(chosen_by: Sequence[int], reported: Sequence[int], metric: str, several: bool) -> str:
    name, noise = label(metric), ", ".join(map(str, reported))
    if chosen_by:
        return (
            f"Each arm has the grid, guidance scale and weights of its lowest mean {name} with "
            f"noise seed {chosen_by[0]}, and as many steps as its evaluations allow; reported "
            f"values are measured with noise seed {noise}."
        )
    rule = f"Each run is sampled with its own config and noise seed {noise}."
    if several:
        rule += (
            " Its other grids, guidance scales and weights are not used: selecting among them "
            "without bias needs a second noise seed, config.evaluation.seeds=(0, 1)."
        )
    return rule


def _own(result: Mapping[str, Any]) -> Way:
    sampling = result.get("sampling", {})
    return Way(*(sampling.get(key, 0) for key in Way._fields))
