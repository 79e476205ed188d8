"""The page about objectives, compared with closed forms and with solvers that must fail."""

import csv
import io
import math
import re
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from diffjax import choices
from diffjax.objectives.base import Objective
from diffjax.objectives.denoising import Denoising
from diffjax.process import paths, precond, schedules, targets, times, weights
from diffjax.process.paths import Path
from diffjax.reports import objectives_page
from diffjax.reports.objectives_page import named_objective, write_objectives_page
from diffjax.sampling import solvers
from diffjax.sampling.solvers import Solver
from diffjax.studies import effective_weights
from diffjax.studies.effective_weights import group_equal, weight_curve, weights_csv
from diffjax.studies.legality import Legality, legality, unwalkable
from experiments import objectives as script
from experiments.flags import cli
from tests.support.messages import error_line

LINEAR = paths.Linear()
NAMES = ("flow", "otcfm", "edm", "edm2", "ddpm", "contrastive")


@pytest.fixture(scope="module")
def curves():
    return {name: weight_curve(named_objective(name)) for name in NAMES}


@pytest.mark.parametrize(
    "name", [*NAMES, *(pytest.param(name, marks=pytest.mark.thorough) for name in ("v", "iddpm"))]
)
def test_the_share_of_the_loss_sums_to_one(curves, name):
    curve = curves[name] if name in curves else weight_curve(named_objective(name))
    assert np.isfinite(curve.weight).all()
    assert (curve.weight >= 0).all()
    assert np.trapezoid(curve.share, curve.log_snr) == pytest.approx(1.0, rel=5e-3)
    parts = [curve.between(*ends) for ends in ((-math.inf, -4), (-4, 4), (4, math.inf))]
    assert sum(parts) == pytest.approx(1.0)


def test_flow_matching_pays_as_the_square_root_of_noise_to_signal(curves):
    """Kingma & Gao 2023, table 1: exp(-λ/2). Its share is integrated by hand.

    With r = e^{λ/2}/2 (sigma_data = ½) the share is proportional to r/(1 + r²), in λ; its integral
    is 2·arctan(r).
    """
    curve = curves["flow"]
    ratio = curve.weight / np.exp(-curve.log_snr / 2)
    inside = np.abs(curve.log_snr) < 10
    np.testing.assert_allclose(ratio[inside], ratio[inside][0], rtol=2e-3)
    for u in (0.25, 0.5, 0.75):
        exact = 2 * math.log(2 * math.tan(u * math.pi / 2))
        assert curve.quantile(u) == pytest.approx(exact, abs=0.02)
    exact = 2 / math.pi * (math.atan(math.exp(2) / 2) - math.atan(math.exp(-2) / 2))
    assert curve.between(-4, 4) == pytest.approx(exact, abs=5e-3)


@pytest.mark.parametrize(("name", "mean", "std"), [("edm", -1.2, 1.2), ("edm2", -0.4, 1.0)])
def test_edm_pays_for_each_noise_level_as_often_as_it_trains_there(curves, name, mean, std):
    """F has unit error on Gaussian data of sigma_data, so the share is the density of log-SNR."""
    curve = curves[name]
    expected = norm.pdf(curve.log_snr, loc=-2.0 * mean, scale=2.0 * std)
    np.testing.assert_allclose(curve.share, expected, atol=2e-4)


def test_objectives_that_weigh_alike_share_a_panel(curves):
    groups = group_equal(curves)
    assert ["flow", "otcfm", "contrastive"] in groups
    assert ["edm"] in groups
    assert ["ddpm"] in groups
    assert effective_weights.plot_effective_weights(curves).startswith(b"\x89PNG")


def test_the_csv_has_the_weight_and_nothing_beyond_the_path(curves):
    rows = {row["log_snr"]: row for row in csv.DictReader(io.StringIO(weights_csv(curves)))}
    at = [float(rows[level]["flow"]) for level in ("-2", "0", "2")]
    assert at[0] / at[1] == pytest.approx(math.e, rel=1e-3)
    assert at[1] / at[2] == pytest.approx(math.e, rel=1e-3)
    assert rows["15"]["flow"] == ""
    assert rows["-15"]["ddpm"] == ""
    assert rows["-15"]["flow"] != ""


@pytest.mark.thorough
@pytest.mark.parametrize("name", choices.OBJECTIVES)
def test_every_named_objective_is_what_its_axes_say(name):
    objective = named_objective(name)
    parts = choices.OBJECTIVES[name]
    names = choices.PATHS[parts["path"]]["_target_"], choices.TARGETS[parts["target"]]["_target_"]
    assert [each.rpartition(":")[2] for each in names] == [
        type(objective.path).__name__,
        type(objective.precond.target).__name__,
    ]
    assert type(objective).__name__ != "Denoising" or parts["wrappers"] == "none"


def divides_by_alpha(after=1.0):
    """Steps in x/a, which is infinite in pure noise; below `after` it stays where it is."""

    def step(denoise, interval, memory, x):
        pair = denoise(x, interval.t)
        moved = x / interval.begin.a * interval.end.a + 0.0 * pair.eps
        return jnp.where(interval.t <= after, moved, x), memory

    return Solver(lambda x: (), step, nfe=1, order=1)


@pytest.mark.thorough(tenth=False)
def test_a_solver_that_fails_is_refused_with_the_time():
    reason = unwalkable(paths.Linear(), divides_by_alpha(), num_steps=4) or ""
    assert "from t=1 to t=0.75" in reason
    assert "alpha=0 and sigma=1" in reason

    def late(denoise, interval, memory, x):
        return jnp.where(interval.t_next < 0.6, jnp.nan, x), memory

    late_solver = Solver(lambda x: (), late, nfe=1, order=1)
    assert "from t=0.75 to t=0.5" in str(unwalkable(paths.Linear(), late_solver, num_steps=4))


def found():
    return legality(
        {"linear": paths.Linear(), "ve": schedules.VarianceExploding()},
        {"noise": targets.Noise(), "clean": targets.Clean()},
        {"heun": solvers.heun(), "bad<b>": divides_by_alpha()},
    )


def test_a_triple_is_legal_where_both_of_its_pairs_are():
    legal = {triple[:3]: triple[3] is None for triple in found().triples()}
    assert legal == {
        ("linear", "noise", "heun"): False,  # predicts nothing at t = 1
        ("linear", "clean", "heun"): True,
        ("linear", "noise", "bad<b>"): False,
        ("linear", "clean", "bad<b>"): False,
        ("ve", "noise", "heun"): True,
        ("ve", "clean", "heun"): True,
        ("ve", "noise", "bad<b>"): True,
        ("ve", "clean", "bad<b>"): True,
    }


@dataclass(frozen=True)
class FewSteps(Objective):
    """An objective without an effective weight."""

    path: Path = LINEAR


def test_the_page_holds_everything(monkeypatch, tmp_path, capsys):
    """The real command, on two objectives and with what was tried above."""
    reason = '<script>alert("1")</script>|'
    tried = Legality(
        {("linear", "noise"): reason, ("linear", "clean"): None},
        {("linear", "euler"): None, ("linear", "heun"): None},
    )
    few = {name: choices.OBJECTIVES[name] for name in ("flow", "edm2", "v")}
    monkeypatch.setattr(choices, "OBJECTIVES", few)

    def none_for_v(name):
        return FewSteps() if name == "v" else named_objective(name)

    monkeypatch.setattr(objectives_page, "named_objective", none_for_v)
    monkeypatch.setattr(objectives_page, "legality", lambda *tables: tried)
    out = tmp_path / "new" / "folder"
    assert cli.run(script.main, script.FLAGS, usage="", argv=[f"--out={out}"]) == 0
    (written,) = capsys.readouterr().out.splitlines()
    assert written == f"open {out / 'index.html'}"
    assert {file.name for file in out.iterdir()} == {
        "index.html", "effective_weights.png", "effective_weights.csv", "effective_weights.md",
        "legality.md", "legality.csv",
    }  # fmt: skip
    page = (out / "index.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)  # it needs no other file
    assert "2 of 4 triples" in page
    assert page.count("✓") == 3
    assert "edm2" in page
    assert "<strong>v</strong>: FewSteps is no squared error" in page
    assert "linear × noise: <script>" in (out / "legality.md").read_text()
    assert "\\|" in (out / "legality.md").read_text()
    rows = list(csv.DictReader((out / "legality.csv").open()))
    assert [(row["target"], row["legal"]) for row in rows] == [
        ("noise", "no"), ("noise", "no"), ("clean", "yes"), ("clean", "yes"),
    ]  # fmt: skip
    assert len((out / "effective_weights.md").read_text().splitlines()) == 4


def test_all_choices_are_tried(monkeypatch, tmp_path):
    """Which tables are gone through, without the work."""
    asked = []

    def remember(*tables):
        asked.append([list(table) for table in tables])
        return Legality({("linear", "v"): None}, {("linear", "ddim"): None})

    curve = weight_curve(named_objective("flow"))
    monkeypatch.setattr(objectives_page, "legality", remember)
    monkeypatch.setattr(effective_weights, "weight_curve", lambda objective: curve)
    write_objectives_page(tmp_path)
    assert asked == [[list(choices.PATHS), list(choices.TARGETS), list(choices.SOLVERS)]]
    header = (tmp_path / "effective_weights.csv").read_text().splitlines()[0]
    assert header.split(",") == ["log_snr", *choices.OBJECTIVES]


def test_mistakes_end_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ([], "--out is missing"),
        ([f"--out={tmp_path}/file/folder"], "can't write to"),
        (["--outt=x"], "unknown flag"),
    ):
        assert cli.run(script.main, script.FLAGS, usage="", argv=arguments) == 2
        error = capsys.readouterr().err
        assert message in error_line(error)


def test_log_normal_times_need_no_weight_to_say_where_they_train():
    """The same density on another path: the curve depends on log-SNR alone."""
    there = Denoising(
        paths.Cosine(),
        precond.Precond(targets.F(), precond.TimeLabel()),
        weights.Constant(),
        times.LogNormal(),
    )
    curve = weight_curve(there)
    assert curve.quantile(0.5) == pytest.approx(2.4, abs=0.02)
    assert curve.quantile(float(norm.cdf(1.0))) == pytest.approx(4.8, abs=0.02)
