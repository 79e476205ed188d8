"""Arms of a sweep against each other: what is chosen, what is reported, and what is refused."""

import numpy as np
import pytest

from diffjax.comparison.arms import Choice, SamplingSetting, Way, compare_arms
from diffjax.errors import UserError
from diffjax.reports.sweep_text import quality_markdown

OWN = Way("heun", 34)


def row(value, way=OWN, scale=1.5, weights="ema", seed=0, grid="uniform", steps=9):
    choice = {"grid": grid, "guidance_scale": scale, "weights": weights, "num_steps": steps}
    return {**way._asdict(), **choice, "seed": seed, "frechet_distance": value}


def made(rows, **facts):
    provenance = {"extractor": "classifier:digits", "num_samples": 1000, "num_floor_images": 359}
    sampling = {"solver": "heun", "num_steps": 9, "nfe": 34, "seed": 0}
    sampling |= {"grid_name": "uniform", "guidance_scale": 1.5}
    entry = {"value": rows[0]["frechet_distance"], "provenance": provenance | facts}
    return {
        "weights": "ema", "sampling": sampling, "frechet_distance": entry, "by_nfe": rows,
    }  # fmt: skip


def swept(values):
    """Runs and their arms from numbers by arm, one a training seed."""
    results = {f"{arm}-{i}": made([row(v)]) for arm, vs in values.items() for i, v in enumerate(vs)}
    return results, {name: name.rpartition("-")[0] for name in results}


def test_arms_are_ranked_and_told_apart_by_their_seeds():
    found = compare_arms(
        *swept({"b": (0.91, 1.0, 0.95), "a": (0.5, 0.61, 0.55), "c": (0.6, 0.5, 0.57)})
    )
    rows = found.verdict_rows()
    assert [(r["arm"], r["verdict"]) for r in rows] == [
        ("a", "leads"), ("c", rows[1]["verdict"]), ("b", "worse"),
    ]  # fmt: skip
    assert rows[1]["verdict"].startswith("inconclusive; ")
    assert rows[2]["gap"].mean == pytest.approx(0.4)
    assert found.own == OWN
    assert found.counts == {"b": (3, 3), "a": (3, 3), "c": (3, 3)}
    assert found.rule == "Each run is sampled with its own config and noise seed 0."


def test_each_arm_is_taken_at_its_best_and_reported_with_other_noise():
    """With noise 0 arm a is best at scale 2, b with live weights; noise 1 and 2 are reported."""

    def run(by_choice):
        return made([
            row(value + 0.1 * (seed > 0), scale=scale, weights=weights, seed=seed)
            for (scale, weights), values in by_choice.items() for seed, value in enumerate(values)
        ])  # fmt: skip

    results = {
        "a": run({(1.5, "ema"): (0.5, 0.2, 0.2), (2.0, "ema"): (0.4, 0.6, 0.8)}),
        "b": run({(1.5, "ema"): (0.9, 0.1, 0.1), (1.5, "live"): (0.3, 0.4, 0.6)}),
    }
    found = compare_arms(results, {"a": "a", "b": "b"})
    a, b = found.standings[OWN]["a"], found.standings[OWN]["b"]
    assert a.choice == Choice(9, SamplingSetting("uniform", 2.0, "ema"))
    assert b.choice == Choice(9, SamplingSetting("uniform", 1.5, "live"))
    assert a.values == pytest.approx((0.1 + (0.6 + 0.8) / 2,))
    assert a.noise == pytest.approx(np.std([0.6, 0.8], ddof=1))
    assert b.values == pytest.approx((0.6,))
    assert "lowest mean Fréchet distance with noise seed 0, and as many steps" in found.rule
    assert "noise seed 1, 2." in found.rule
    assert str(b.choice) == "9 steps, uniform grid, guidance 1.5, live"


def test_guidance_competes_with_none_at_equal_evaluations_with_half_the_steps():
    """Scale 1 costs one evaluation a step less: 18 steps of it cost what 9 guided ones do."""

    def run(shift):
        return made([
            row(value + shift, Way("ddim", nfe), scale=scale, seed=seed, steps=steps)
            for seed in (0, 1)
            for scale, steps, nfe, value in (
                (1.5, 9, 18, 0.5), (1.5, 18, 36, 0.2), (1.0, 18, 18, 0.3), (1.0, 36, 36, 0.4),
                (1.0, 9, 9, 0.9),
            )
        ])  # fmt: skip

    found = compare_arms({"a": run(0.0), "b": run(0.1)}, {"a": "a", "b": "b"}).standings
    assert found[Way("ddim", 18)]["a"].choice == Choice(18, SamplingSetting("uniform", 1.0, "ema"))
    assert found[Way("ddim", 36)]["b"].choice == Choice(18, SamplingSetting("uniform", 1.5, "ema"))
    assert found[Way("ddim", 36)]["b"].values == pytest.approx((0.3,))
    assert found[Way("ddim", 9)]["a"].values == (0.9,)


def test_with_two_evaluations_a_step_the_nearest_below_counts_as_equal():
    """Heun's 9 guided steps cost 34 evaluations; without guidance there are 33 and 35."""
    rows = [row(0.5, seed=seed) for seed in (0, 1)]
    rows += [row(0.4, Way("heun", 33), scale=1.0, seed=seed, steps=17) for seed in (0, 1)]
    rows += [row(0.1, Way("heun", 35), scale=1.0, seed=seed, steps=18) for seed in (0, 1)]
    rows += [row(0.1, Way("heun", 17), scale=1.0, seed=seed, steps=9) for seed in (0, 1)]
    found = compare_arms({"a": made(rows)}, {"a": "a"}).standings
    assert found[OWN]["a"].choice == Choice(17, SamplingSetting("uniform", 1.0, "ema"))
    assert found[Way("heun", 17)]["a"].choice.num_steps == 9


def test_with_one_noise_seed_nothing_is_chosen():
    """The best of several would flatter: the config's own grid, scale and weights count alone."""
    run = made([row(0.5), row(0.2, grid="karras"), row(0.1, scale=2.0), row(0.3, weights="live")])
    found = compare_arms({"a": run}, {"a": "a"})
    assert found.standings[OWN]["a"].values == (0.5,)
    assert "Its other grids, guidance scales and weights are not used" in found.rule
    assert "config.evaluation.seeds=(0, 1)" in found.rule


def test_a_choice_never_flatters():
    """Choosing among settings that are equal in truth leaves the reported mean where it is."""
    rng = np.random.default_rng(0)
    reported = []
    for _ in range(300):
        values = rng.normal(1.0, 0.1, (8, 2))
        rows = [row(v, scale=1.0 + i, seed=s) for i, pair in enumerate(values)
                for s, v in enumerate(pair)]  # fmt: skip
        found = compare_arms({"a": made(rows)}, {"a": "a"})
        reported.append(found.standings[OWN]["a"].interval.mean)
        assert found.standings[OWN]["a"].choice.setting.guidance_scale == 1.0 + np.argmin(
            values[:, 0]
        )
    assert np.mean(reported) == pytest.approx(1.0, abs=4 * 0.1 / np.sqrt(300))


def test_arms_with_missing_runs_are_shown_and_not_judged():
    results, arms = swept({"a": (0.5, 0.6), "b": (0.9, 1.0), "c": (0.1, 0.2)})
    del results["c-1"]
    found = compare_arms(results, arms)
    verdicts = {r["arm"]: r["verdict"] for r in found.verdict_rows()}
    assert verdicts["c"] == "incomplete: 1 of 2 seeds evaluated"
    assert verdicts["a"] == "leads"
    # A run without a value does not count.
    results["b-1"]["by_nfe"][0]["frechet_distance"] = None
    rows = compare_arms(results, arms).verdict_rows()
    assert [(r["arm"], r["verdict"], r["seeds"]) for r in rows] == [
        ("c", "incomplete: 1 of 2 seeds evaluated", 1),
        ("a", "nothing to compare it with", 2),
        ("b", "no value for 1 of 2 seeds: no verdict", 1),
    ]
    results["b-0"]["by_nfe"][0]["frechet_distance"] = np.inf
    rows = compare_arms(results, {**arms, "d": "d"}).verdict_rows()
    assert {"arm": "b", "verdict": "no value", "seeds": 0} in rows
    assert rows[-1] == {"arm": "d", "verdict": "not evaluated", "seeds": 0}


def test_arms_are_paired_by_training_seed():
    """The order of runs has no effect, and a seed that only one arm has makes no pair."""
    results, arms = swept({"a": (0.5, 1.5, 2.5), "b": (0.6, 1.6, 2.61)})
    seeds = {name: int(name[-1]) for name in arms}
    backwards = dict(reversed(arms.items()))
    for order in (arms, backwards):
        rows = compare_arms(results, order, seeds=seeds).verdict_rows()
        assert [r["verdict"] for r in rows] == ["leads", "worse"]
        assert rows[0]["training_seeds"] == tuple(seeds[n] for n in order if n[0] == "a")
    apart = {name: seed + 7 * (name[0] == "b") for name, seed in seeds.items()}
    rows = compare_arms(results, arms, seeds=apart).verdict_rows()
    assert [r["verdict"] for r in rows] == ["no two seeds in common: no verdict"] * 2
    del results["b-2"], arms["b-2"]
    rows = compare_arms(results, arms, seeds=seeds).verdict_rows()
    assert [r["arm"] for r in rows] == ["b", "a"], "b has no third seed, and the lesser mean"
    assert rows[1]["verdict"].startswith("inconclusive") or rows[1]["verdict"] == "worse"


def test_the_setting_is_chosen_by_a_noise_seed_that_all_have():
    """The run's own row has a noise seed that the others lack; infinite means choose nothing."""
    rows = [row(0.5, seed=seed) for seed in (0, 1, 2)]
    rows += [row(value, scale=2.0, seed=seed) for seed, value in ((1, 0.2), (2, 0.3))]
    found = compare_arms({"a": made(rows)}, {"a": "a"})
    assert found.standings[OWN]["a"].choice.setting.guidance_scale == 2.0
    assert found.standings[OWN]["a"].values == (0.3,)
    assert "with noise seed 1, and as many" in found.rule
    for one in rows:
        one["frechet_distance"] = np.inf if one["seed"] == 1 else 0.5
    with pytest.raises(UserError, match="no run has a Fréchet distance"):
        compare_arms({"a": made(rows)}, {"a": "a"})


def test_runs_without_a_common_noise_seed_are_refused():
    runs = {"a": made([row(0.5, seed=0)]), "b": made([row(0.5, seed=1)])}
    with pytest.raises(UserError, match="without a common noise seed: evaluate all with the"):
        compare_arms(runs, {"a": "a", "b": "b"})


def test_the_table_has_a_row_a_cost_and_a_column_an_arm():
    one = Way("ddim", 10)
    results = {
        "a-0": made([row(0.5), row(1.0, one)]),
        "a-1": made([row(0.7), row(3.0, one)]),
        "b-0": made([row(0.9, grid="karras")]),  # its own, and no choice
    }
    found = compare_arms(results, {"a-0": "a", "a-1": "a", "b-0": "b"})
    lines = quality_markdown(found).splitlines()
    assert lines[0] == "| solver | NFE | a | b |"
    # Of two values a distance d apart Student's interval is 12.706 d/2 to each side, none below 0.
    assert lines[2] == "| ddim | 10 | 2.00 (0.00 to 14.7) | – |"
    assert lines[3] == "| heun | 34 | 0.600 (0.00 to 1.87) | 0.900 |"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (made([row(0.5)], num_samples=50), "a and c can't be compared: num_samples is 1000 and 50"),
        (
            made([row(0.5)], extractor="inception"),
            "extractor is classifier:digits and inception",
        ),
        ({"frechet_distance": 0.5, "by_nfe": []}, "of c can't be compared, because it has no prov"),
    ],
)
def test_unlike_provenance_is_refused(other, message):
    results = {"a": made([row(0.5)]), "b": made([row(0.6)]), "c": other}
    with pytest.raises(UserError, match=message):
        compare_arms(results, {name: name for name in results})


def test_a_floor_of_other_images_changes_no_value():
    results = {"a": made([row(0.5)]), "b": made([row(0.7)], num_floor_images=10)}
    found = compare_arms(results, {name: name for name in results})
    assert [r["interval"].mean for r in found.verdict_rows()] == [0.5, 0.7]


def test_nothing_to_compare_is_said():
    with pytest.raises(UserError, match="no run has a Fréchet distance"):
        compare_arms({}, {"a": "a"})
