"""Searches: which trials are trained, that they can go on, and what their page claims."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from diffjax.comparison.results import read_sweep
from diffjax.comparison.summary import numbers
from diffjax.errors import UserError
from diffjax.reports.sweep_page import answer
from diffjax.sweeps import search
from diffjax.sweeps.cells import Planned
from diffjax.sweeps.sweep import Between, Cost, Sweep
from experiments import sweep as command

RATE, DECAY = "config.optimizer.learning_rate", "config.optimizer.rule.b1"
SWEEP = Sweep(
    "configs/digits.py",
    {
        "objective": ("flow", "edm"),
        RATE: Between(1e-4, 1e-2, log=True),
        "config.batch_size": Between(8, 64, log=True, whole=True),
        "config.seed": (0, 5),
    },
)


def test_shares_of_a_range_are_uniform_in_the_number_or_its_logarithm():
    shares = (np.arange(1_000) + 0.5) / 1_000
    whole = [Between(3, 6, whole=True).at(share) for share in shares]
    assert [whole.count(number) for number in (3, 4, 5, 6)] == [250] * 4
    rates = np.array([Between(1e-4, 1e-2, log=True).at(share) for share in shares])
    assert np.mean(rates < 1e-3) == 0.5
    assert (rates.min(), rates.max()) >= (1e-4, 9.9e-3)
    assert Between(0.0, 0.9).at(1 / 3) == 0.3
    assert Between(0.1234, 0.5).rounded(0.1231) == 0.1234  # not below its end


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), (0.0, math.inf)])
def test_ends_out_of_order_are_refused(ends):
    with pytest.raises(UserError, match="low has to be below high"):
        Between(*ends)


def test_a_logarithm_needs_positive_numbers_and_a_range_needs_a_search():
    with pytest.raises(UserError, match="log needs positive"):
        Between(0.0, 1.0, log=True)
    with pytest.raises(UserError, match="learning_rate is a range: add --search=random"):
        SWEEP.cells()


def test_a_longer_random_search_begins_with_the_trials_of_a_shorter_one():
    trials = search.random_trials(SWEEP, 6)
    assert trials[:3] == search.random_trials(SWEEP, 3)
    assert trials != search.random_trials(SWEEP, 6, seed=1)
    assert len({json.dumps(trial) for trial in trials}) == 6
    for trial in trials:
        assert trial["objective"] in ("flow", "edm")
        assert 1e-4 <= trial[RATE] <= 1e-2
        assert trial["config.batch_size"] in range(8, 65)
    few = Sweep("c.py", {"objective": ("a", "b"), "config.seed": (0,)})
    assert {trial["objective"] for trial in search.random_trials(few, 9)} == {"a", "b"}


def test_each_trial_is_an_arm_with_every_seed():
    trials = search.random_trials(SWEEP, 2)
    cells = Sweep(SWEEP.config, SWEEP.axes, trials=trials).cells()
    assert [cell.axes["config.seed"] for cell in cells] == [0, 5, 0, 5]
    assert cells[0].arm == cells[1].arm != cells[2].arm
    rate = trials[0][RATE]
    assert f"learning_rate={rate}" in cells[0].arm
    assert cells[0].overrides[RATE] == str(rate)
    assert "seed=0" in cells[0].name


def test_what_can_not_be_searched_is_refused():
    with pytest.raises(UserError, match="nothing to search"):
        search.random_trials(Sweep("c.py", {"config.seed": (0, 1)}), 2)
    with pytest.raises(UserError, match="not matched='flops'"):
        search.random_trials(Sweep("c.py", {"objective": ("a", "b")}, matched="flops"), 2)


def test_without_optuna_its_search_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'diffjax\[search\]'"):
        search.adaptive_trials(SWEEP, [], 1)


class FakeOptuna:
    """What a search uses of Optuna; it asks for what it is given."""

    def __init__(self, asked):
        self.told, self._asked = [], iter(asked)
        names = ("CategoricalDistribution", "IntDistribution", "FloatDistribution")
        make = {name: lambda *ends, name=name, **how: (name, ends) for name in names}
        self.distributions = SimpleNamespace(**make)
        self.logging = SimpleNamespace(WARNING=0, set_verbosity=lambda level: None)
        self.samplers = SimpleNamespace(TPESampler=lambda **how: how)
        state = SimpleNamespace(FAIL="fail", COMPLETE="complete")
        self.trial = SimpleNamespace(TrialState=state, create_trial=lambda **about: about)

    def create_study(self, sampler):
        ask = lambda spaces: SimpleNamespace(params=next(self._asked))  # noqa: E731
        return SimpleNamespace(add_trial=self.told.append, ask=ask)


def test_optuna_is_told_results_and_its_numbers_become_values(monkeypatch):
    asked = {"objective": 1, RATE: 0.0012345, "config.batch_size": 16}
    fake = FakeOptuna([asked, asked])
    monkeypatch.setitem(__import__("sys").modules, "optuna", fake)
    first = {"objective": "edm", RATE: 1e-3, "config.batch_size": 8}
    new = search.adaptive_trials(SWEEP, [(first, 0.5), ({**first, RATE: 2e-3}, None)], 2)
    assert new[0] == {"objective": "edm", RATE: 0.00123, "config.batch_size": 16}
    assert new[1] not in (new[0], first)  # the same once more is another trial
    assert [(one["state"], one["value"]) for one in fake.told] == [
        ("complete", 0.5),
        ("fail", None),
    ]
    assert fake.told[0]["params"] == {**first, "objective": 1}
    assert fake.told[0]["distributions"][RATE] == ("FloatDistribution", (1e-4, 1e-2))


@pytest.mark.parity
def test_optuna_comes_near_a_minimum_and_asks_the_same_of_the_same_results():
    pytest.importorskip("optuna")
    sweep = Sweep("c.py", {RATE: Between(1e-5, 1.0, log=True), "objective": ("a", "b")})
    told = []
    while len(told) < 30:
        new = search.adaptive_trials(sweep, told, 3)
        assert new == search.adaptive_trials(sweep, told, 3)
        told += [(t, (math.log10(t[RATE]) + 2.0) ** 2 + (t["objective"] == "b")) for t in new]
    (best,) = search.best_trials(told, 1)
    assert best["objective"] == "a"
    assert abs(math.log10(best[RATE]) + 2.0) < 0.3
    late = [value for _, value in told[-9:]]
    assert np.mean(late) < np.mean([value for _, value in told[:9]])


ARGS = SimpleNamespace(
    search="optuna", trials=5, search_seed=0, workers=2, ensemble=1, sweep="s.py",
    finalists=2, final_seeds=3, dry_run=False,
)  # fmt: skip


@pytest.fixture
def trained(monkeypatch):
    """Trials are asked in order, and a cell's distance is written instead of trained."""
    asked = search.random_trials(SWEEP, 20)

    def adaptive(sweep, results, number, seed=0):
        return asked[len(results) : len(results) + max(number, 0)]

    def checked(sweep, most):
        cells = sweep.cells()
        costs = {cell.name: Cost(10, 8, None) for cell in cells}
        return Planned(cells, costs, {}, [[cell.name] for cell in cells])

    rounds = []

    def train(args, sweep, workdir, planned, facts):
        rounds.append(len(planned.cells))
        workdir.mkdir(parents=True, exist_ok=True)
        content = {**command.plan(args.sweep, sweep, planned), **facts}
        (workdir / "sweep.json").write_text(json.dumps(content))
        for cell in planned.cells:
            (workdir / cell.name).mkdir(exist_ok=True)
            value = cell.axes[RATE] + cell.axes["config.seed"]
            text = json.dumps({"frechet_distance": {"value": value}})
            (workdir / cell.name / "evaluation.json").write_text(text)

    monkeypatch.setattr(command, "adaptive_trials", adaptive)
    monkeypatch.setattr(command, "checked", checked)
    monkeypatch.setattr(command, "train_planned", train)
    monkeypatch.setattr(command, "conclude", lambda *_: 0)
    return SimpleNamespace(asked=asked, rounds=rounds)


def test_an_adaptive_search_trains_as_many_trials_at_a_time_as_workers_and_resumes(
    trained, tmp_path
):
    assert command.search(ARGS, SWEEP, tmp_path, "the command") == 0
    # 2, 4 and 5 trials of two seeds; then two finalists of three fresh seeds.
    assert trained.rounds == [4, 8, 10, 6]
    plan = json.loads((tmp_path / "sweep.json").read_text())
    assert plan["search"]["tried"] == trained.asked[:5]
    finals = json.loads((tmp_path / "finalists" / "sweep.json").read_text())
    best = sorted(trained.asked[:5], key=lambda trial: trial[RATE])[:2]
    assert {cell["axes"]["config.seed"] for cell in finals["cells"]} == {6, 7, 8}
    assert {cell["axes"][RATE] for cell in finals["cells"]} == {trial[RATE] for trial in best}
    trained.rounds.clear()
    longer = SimpleNamespace(**{**vars(ARGS), "trials": 6, "finalists": 0})
    assert command.search(longer, SWEEP, tmp_path, "the command") == 0
    assert trained.rounds == [10, 12]
    other = SimpleNamespace(**{**vars(longer), "search_seed": 1})
    with pytest.raises(UserError, match="holds another sweep or search"):
        command.search(other, SWEEP, tmp_path, "the command")


def test_a_random_search_is_planned_at_once(trained, tmp_path):
    args = SimpleNamespace(**{**vars(ARGS), "search": "random", "finalists": 0})
    assert command.search(args, SWEEP, tmp_path, "the command") == 0
    assert trained.rounds == [10]
    plan = json.loads((tmp_path / "sweep.json").read_text())
    assert plan["search"] == {"method": "random", "trials": 5, "seed": 0}


def test_a_trial_has_a_result_if_all_its_seeds_have(tmp_path):
    sweep = Sweep("c.py", {"objective": ("a", "b"), "config.seed": (0, 1)})
    for name, value in {"a-seed=0": 1.0, "a-seed=1": 3.0, "b-seed=0": 1.0}.items():
        (tmp_path / name).mkdir()
        text = json.dumps({"frechet_distance": {"value": value}})
        (tmp_path / name / "evaluation.json").write_text(text)
    found = command.results_of(sweep, tmp_path)
    assert found == [({"objective": "a"}, 2.0), ({"objective": "b"}, None)]


def page(folder, method, adaptive):
    row = {"solver": "heun", "grid": "uniform", "num_steps": 9, "nfe": 17, "seed": 0}
    row |= {"guidance_scale": 1.0, "weights": "ema"}
    cells = []
    for arm, base in (("a", 0.5), ("b", 2.5)):
        for seed, shift in enumerate((0.0, 0.1, 0.05)):
            name, value = f"{arm}-seed={seed}", base + shift + 0.01 * seed * (arm == "b")
            (folder / name).mkdir(parents=True)
            config = {"name": arm, "seed": seed, "num_steps": 10}
            (folder / name / "config.json").write_text(json.dumps(config))
            provenance = {"extractor": "pixels", "num_samples": 100}
            result = {
                "step": 10,
                "weights": "ema",
                "sampling": {"solver": "heun", "grid_name": "uniform", "num_steps": 9, "nfe": 17}
                | {"guidance_scale": 1.0, "seed": 0, "noise_seed": 0},
                "frechet_distance": {"value": value, "provenance": provenance},
                "by_nfe": [{**row, "frechet_distance": value}],
            }
            (folder / name / "evaluation.json").write_text(json.dumps(result))
            cells.append({"name": name, "arm": arm, "axes": {"arm": arm, "config.seed": seed}})
    about = {"method": method, "trials": 2, "seed": 0}
    about |= {"tried": [{"arm": "a"}]} if adaptive else {}
    (folder / "sweep.json").write_text(json.dumps({"cells": cells, "search": about}))
    return numbers(read_sweep([folder]))


def test_a_page_of_a_search_claims_no_more_than_it_can(tmp_path):
    drawn = page(tmp_path / "random", "random", adaptive=False)
    assert [row["verdict"] for row in drawn["verdict_rows"]] == ["leads", "worse"]
    assert (
        "The best of 2 trials of this search (random) was chosen by these numbers" in drawn["rule"]
    )
    found = page(tmp_path / "optuna", "optuna", adaptive=True)
    assert {row["verdict"] for row in found["verdict_rows"]} == {"chosen adaptively: no verdict"}
    assert "there is no verdict" in found["rule"]
    sentence = answer(found["verdict_rows"])
    assert sentence.startswith("a has the lowest Fréchet distance")
    assert sentence.endswith("of 2 trials of an adaptive search: no verdict.")
