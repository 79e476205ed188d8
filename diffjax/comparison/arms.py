"""Arms of a sweep held against each other, each at its best by one stated rule."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from diffjax.comparison.provenance import check_comparable
from diffjax.comparison.verdicts import (
    Difference,
    Interval,
    bootstrap_interval,
    differences,
    mean_interval,
    verdict_of,
)
from diffjax.errors import UserError
from diffjax.evaluation.tables import is_number, label, range_of

Results = Mapping[str, Mapping[str, Any]]


class Way(NamedTuple):
    """A solver, and what a sample may cost at most; what a row of the table is."""

    solver: str
    nfe: int

    def __str__(self):
        return f"{self.solver}, NFE {self.nfe}"


class Setting(NamedTuple):
    """What is chosen for each arm and way by itself, since it ranks arms anew."""

    grid: str
    guidance_scale: float
    weights: str


class Choice(NamedTuple):
    """A setting with as many steps as the way affords: guidance halves them."""

    num_steps: int
    setting: Setting

    def __str__(self):
        grid, scale, weights = self.setting
        return f"{self.num_steps} steps, {grid} grid, guidance {scale:g}, {weights}"


class Drawn(NamedTuple):
    """What one run was measured to be at one setting and cost: values by noise seed."""

    num_steps: int
    values: dict[int, float]


# By solver and setting, then by evaluations a sample.
Table = Mapping[tuple[str, Setting], Mapping[int, Drawn]]


class Standing(NamedTuple):
    """One arm at one way.

    Attributes:
        choice: that the rule chose, the same for all training seeds.
        values: a number for each training seed, the mean over the noise seeds that are reported.
        training_seeds: which ones.
        missing: how many training seeds have no number, or one that is not finite.
        noise: the standard deviation that another noise seed makes, pooled over the training seeds;
            None if one alone is reported.
        interval: of the mean, Student's over the training seeds.
        bootstrap: the same by resampling training seeds and noise seeds.
    """

    choice: Choice
    values: tuple[float, ...]
    training_seeds: tuple[Hashable, ...]
    missing: int
    noise: float | None
    interval: Interval
    bootstrap: Interval


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
            For each `arm, verdict, seeds`, and where it was measured what its `Standing` has, and
            `gap`, the interval of what it is more than the best arm. An arm leads where at least
            one other is decided to be worse.
        """
        standings = self.standings[way or self.own]
        ranked = sorted(standings, key=lambda arm: standings[arm].interval.mean)
        whole = {
            arm: dict(zip(standings[arm].training_seeds, standings[arm].values, strict=True))
            for arm in ranked
            if self.counts[arm][0] == self.counts[arm][1] and not standings[arm].missing
        }
        pairs = differences(whole, self.level)
        leader = next(iter(whole), "")
        rows = []
        for arm in ranked:
            found = pairs.get((leader, arm))
            compared = [pairs[pair].decided for pair in pairs if leader in pair]
            if arm == leader and compared:
                verdict = "leads" if any(compared) else "least mean, nothing decided"
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
            {"arm": arm, "verdict": "no number" if evaluated else "not evaluated", "seeds": 0}
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
        """Of an arm that is not the first of several whole ones."""
        (evaluated, runs), missing = self.counts[arm], standings[arm].missing
        if evaluated < runs:
            return f"incomplete: {evaluated} of {runs} seeds evaluated"
        if missing:
            return f"no number for {missing} of {runs} seeds: no verdict"
        if found:
            return verdict_of(found)
        if len(whole) == 1:
            return "nothing to compare it with"
        if len(whole[arm]) == 1:
            return "one seed: no verdict"
        return "no two seeds in common: no verdict"


def _negative(interval: Interval) -> Interval:
    return Interval(-interval.mean, -interval.high, -interval.low)


def compare(
    results: Results,
    arms: Mapping[str, str],
    metric: str = "frechet_distance",
    *,
    seeds: Mapping[str, Hashable] | None = None,
) -> Comparison:
    """Compares arms at each way of drawing samples that they share.

    Grid, guidance scale and weights re-rank arms, so where a run was evaluated with several, each
    arm has its own best: those of least mean over the training seeds, measured with the first
    noise seed. What is reported is measured with the other noise seeds, so that choosing does not
    flatter. All have as many evaluations a sample: guidance, which doubles those of a step, has
    half the steps. Costs up to a tenth below count as equal, because with solvers of several
    evaluations a step no two numbers of steps cost the same with and without guidance. Without a
    choice, or a second noise seed, each run is sampled as its config says, and all noise seeds are
    reported.

    Args:
        results: the content of each run's `evaluation.json`, by the run's name; None or missing
            where there is none yet.
        arms: the arm of each run, by the run's name; runs of one arm differ in their seed alone.
        metric: a number of the rows `by_nfe`; less is better.
        seeds: the training seed of each run, by which arms are paired; its place among those of
            its arm by default.

    Raises:
        UserError: numbers measured in unlike ways, with no noise seed in common, or none.
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
            "the runs were evaluated with no noise seed in common: evaluate all with one --seed"
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
        raise UserError(f"there is no {label(metric)} of any run to compare")
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
    """A run's numbers."""
    found: dict[tuple[str, Setting], dict[int, Drawn]] = {}
    for row in result["by_nfe"]:
        # Rows of before weights and seeds were in them have the run's own.
        weights = row.get("weights", result.get("weights", ""))
        setting = Setting(row["grid"], float(row.get("guidance_scale", 1.0)), weights)
        seed = row.get("seed", result.get("sampling", {}).get("seed", 0))
        at = found.setdefault((row["solver"], setting), {})
        value = row.get(metric)
        values = at.setdefault(row["nfe"], Drawn(row["num_steps"], {})).values
        values[seed] = value if is_number(value) else np.nan
    return found


def _at(table: Table, way: Way) -> dict[Choice, dict[int, float]]:
    """Each setting with the most evaluations that a way affords, if that is about as many."""
    found = {}
    for (solver, setting), by_nfe in table.items():
        affordable = [nfe for nfe in by_nfe if 0.9 * way.nfe <= nfe <= way.nfe]
        if solver == way.solver and affordable:
            num_steps, values = by_nfe[max(affordable)]
            found[Choice(num_steps, setting)] = values
    return found


def _with_its_own(table: Table, result: Mapping[str, Any]) -> Table:
    """A run's numbers with the grid, guidance scale and weights of its config alone."""
    sampling = result.get("sampling", {})
    grid, scale = sampling.get("grid_name"), sampling.get("guidance_scale")
    own = Setting(grid, scale, result.get("weights", ""))
    return {key: by_nfe for key, by_nfe in table.items() if key[1] == own}


def _standing(
    runs: Mapping[Hashable, Mapping[Choice, Mapping[int, float]]],
    chosen_by: Sequence[int],
    reported: Sequence[int],
    bounds: tuple[float, float],
) -> Standing | None:
    """An arm at one way, from its runs' numbers by training seed; None if there are none."""
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
            f"Each arm has the grid, guidance scale and weights of its least mean {name} with "
            f"noise seed {chosen_by[0]}, and as many steps as its evaluations allow; what is "
            f"reported is measured with noise seed {noise}."
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
