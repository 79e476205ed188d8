"""What a comparison's page claims: no more than is decided, and intervals where numbers can be."""

import json

import numpy as np
import pytest
import scipy.stats

from diffjax.comparison.arms import compare_arms
from diffjax.comparison.results import read_sweep
from diffjax.comparison.side_by_side import metric_rows
from diffjax.comparison.summary import numbers
from diffjax.comparison.verdicts import mean_interval, paired_differences, verdict_of
from diffjax.evaluation.tables import LABELS, METRICS, range_of
from diffjax.reports.sweep_page import answer

PROVENANCE = {"extractor": "pixels:2x2", "num_samples": 100}


def evaluation(distance, recall):
    row = {"solver": "heun", "grid": "uniform", "num_steps": 9, "nfe": 17, "seed": 0}
    row |= {"guidance_scale": 1.0, "weights": "ema", "frechet_distance": distance}
    row |= {"accuracy": recall, "kernel_distance": distance - 0.5}
    return {
        "step": 10,
        "weights": "ema",
        "sampling": {"solver": "heun", "grid_name": "uniform", "num_steps": 9, "nfe": 17}
        | {"guidance_scale": 1.0, "seed": 0, "noise_seed": 0},
        "frechet_distance": {"value": distance, "provenance": PROVENANCE},
        "kernel_distance": {"value": distance - 0.5, "provenance": PROVENANCE},
        "recall": {"value": recall, "provenance": PROVENANCE},
        "by_nfe": [row],
    }


@pytest.fixture
def pages(tmp_path):
    """Writes runs and reads the text of their page."""

    def write(arms):
        folders = []
        for arm, values in arms.items():
            for seed, (distance, recall) in enumerate(values):
                folder = tmp_path / f"{arm}-seed={seed}"
                folder.mkdir()
                config = {"name": arm, "seed": seed, "num_steps": 10, "arm": arm}
                (folder / "config.json").write_text(json.dumps(config))
                found = json.dumps(evaluation(distance, recall))
                (folder / "evaluation.json").write_text(found)
                folders.append(folder)
        files = read_sweep([tmp_path])
        return files, numbers(files)

    return write


def test_with_two_seeds_that_decide_nothing_no_arm_leads(pages):
    """Differences 0.10 and 0.50: t = 0.30/0.20 = 1.5 with one degree of freedom, p = 0.37."""
    _, content = pages({"a": [(0.40, 0.9), (0.60, 0.8)], "b": [(0.50, 0.9), (1.10, 0.8)]})
    assert 2 * scipy.stats.t.sf(1.5, 1) == pytest.approx(0.374, abs=1e-3)
    rows = content["verdict_rows"]
    assert [row["arm"] for row in rows] == ["a", "b"]
    assert rows[0]["verdict"] == "lowest mean, nothing decided"
    sentence = answer(rows)
    assert "leads" not in sentence + json.dumps(rows)
    assert sentence.startswith("Nothing is decided: a has the lowest Fréchet distance, 0.500 (")
    assert "1 is inconclusive with these seeds" in sentence


def test_one_seed_leads_nowhere(pages):
    _, content = pages({"a": [(0.40, 0.9)], "b": [(0.50, 0.9)]})
    assert "leads" not in answer(content["verdict_rows"])
    assert "too few seeds for a verdict on the 1 other arm" in answer(content["verdict_rows"])


def test_an_arm_leads_where_one_other_is_decided_to_be_worse():
    values = {"a": (0.50, 0.61, 0.55), "b": (0.56, 0.58, 0.60), "c": (2.50, 2.61, 2.56)}
    row = {"solver": "heun", "grid": "uniform", "num_steps": 9, "nfe": 17, "seed": 0}
    results = {
        f"{arm}{seed}": evaluation(value, 0.5) | {"by_nfe": [{**row, "frechet_distance": value}]}
        for arm, each in values.items()
        for seed, value in enumerate(each)
    }
    rows = compare_arms(results, {name: name[0] for name in results}).verdict_rows()
    assert [row["verdict"].partition(";")[0] for row in rows] == ["leads", "inconclusive", "worse"]
    # A difference between other arms does not concern the first.
    without_c = {name: result for name, result in results.items() if name[0] != "c"}
    rows = compare_arms(without_c, {name: name[0] for name in without_c}).verdict_rows()
    assert not any("leads" in row["verdict"] for row in rows)


def test_a_number_of_seeds_is_said_with_its_condition_and_is_no_promise():
    found = paired_differences({"a": [0.40, 0.60], "b": [0.50, 1.10]})["a", "b"]
    assert found.seeds is not None
    words = verdict_of(found)
    assert "settle" not in words
    assert words == (
        f"inconclusive; if the true difference is this one, {found.seeds} seeds have a power of "
        "80 %"
    )
    # Four times in five: the power of Student's test at that number, by its definition.
    limit = scipy.stats.t.isf(0.025, found.seeds - 1)
    effect = 1.5 / np.sqrt(2.0)  # the mean over the deviation of 0.10 and 0.50
    assert scipy.stats.nct.sf(limit, found.seeds - 1, effect * np.sqrt(found.seeds)) >= 0.8
    same = paired_differences({"a": [1.0, 2.0], "b": [1.0, 2.0]})["a", "b"]
    assert verdict_of(same).endswith("1,000 are too few")


def test_intervals_stay_where_the_numbers_can_be(pages):
    """Of 0.95 and 0.85 Student's is 0.90 ± 12.7·0.05, of distances 0.5 ± 1.27."""
    files, content = pages({"a": [(0.4, 0.95), (0.6, 0.85)], "b": [(9.5, 0.95), (9.9, 0.05)]})
    plain = scipy.stats.t.interval(0.95, 1, 0.90, 0.05)
    assert plain[0] == pytest.approx(0.265, abs=1e-3)
    assert plain[1] == pytest.approx(1.535, abs=1e-3)
    rows = {row["name"]: row["arms"] for row in metric_rows(files)}
    assert rows["recall"]["a"]["low"] == pytest.approx(plain[0])
    assert rows["recall"]["a"]["high"] == 1.0
    assert (rows["recall"]["b"]["low"], rows["recall"]["b"]["high"]) == (0.0, 1.0)
    verdict = {row["arm"]: row for row in content["verdict_rows"]}
    for one in (
        rows["frechet_distance"]["a"],
        verdict["a"],
        content["quality"][0]["frechet_distance"],
    ):
        assert (one["low"], one["high"]) == pytest.approx((0.0, 0.5 + 1.2706), abs=1e-3)
    # Unbiased, about 0 and of either sign: here there is nothing to cut.
    assert rows["kernel_distance"]["a"]["low"] == pytest.approx(-1.2706, abs=1e-3)
    assert content["quality"][0]["accuracy"]["high"] == 1.0


@pytest.mark.parametrize("n", [2, 4])
def test_an_interval_that_ends_at_the_bounds_holds_the_truth_as_often(n):
    rng = np.random.default_rng(3)
    draws = rng.normal(0.97, 0.1, (2_000, n))
    within = [mean_interval(x, bounds=(0.0, 1.0)) for x in draws]
    held = np.mean([one.low <= 0.97 <= one.high for one in within])
    assert held == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / 2_000))
    assert mean_interval([0.5], bounds=(0.0, 1.0)) == (0.5, -np.inf, np.inf)


def test_every_number_of_a_page_has_a_range_or_is_free():
    free = {"kernel_distance", "frechet_distance_at_infinity", "data_copying", "bits_per_dim"}
    assert {name for name in LABELS if range_of(name) == (-np.inf, np.inf)} == free
    assert all(range_of(name) == (0.0, 1.0) for name, one in METRICS.items() if one.is_share)
    assert range_of("recall (inception:pool)") == (0.0, 1.0)
