"""The page that compares runs: true, whole, safe, and of use while runs are missing."""

import base64
import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from sklearn.datasets import load_digits

from diffjax.comparison.results import read_sweep
from diffjax.comparison.summary import pareto_front
from diffjax.errors import UserError
from diffjax.reports import pictures, plots
from diffjax.reports.sweep_page import write_sweep_report
from experiments import report
from experiments.flags import cli

ARMS = {"flow": 0.50, "edm": 0.40, "ddpm": 2.40}
SEEDS = (0, 1, 2)
SHIFTS = {0: 0.00, 1: 0.03, 2: -0.02}  # of all arms alike, as a seed does
OWN = {"flow": (0.004, -0.002, 0.001), "edm": (-0.003, 0.002, 0.0), "ddpm": (0.02, -0.05, 0.01)}
STEPS = (5, 9, 18)
EVIL = "<script>alert('&|')</script>"
PROVENANCE = {
    "extractor": "classifier:digits",
    "extractor_sha256": "9f" * 32,
    "reference": "digits/train",
    "num_samples": 1000,
    "num_reference_images": 1438,
}


def distance(arm, seed, calls):
    return ARMS[arm] + SHIFTS[seed] + OWN[arm][seed] + 30.0 / calls**2


def config(arm, seed):
    return {
        "name": f"digits-{arm}",
        "seed": seed,
        "num_steps": 1200,
        "path": {"_target_": f"diffjax.process.paths:{'Linear' if arm == 'flow' else 'Cosine'}"},
        "optimizer": {"_target_": "diffjax.optimizers.descent:descent", "learning_rate": 0.002},
        "ema_decays": [0.99, 0.999],
    }


def evaluation(arm, seed):
    rows = [
        {
            "solver": solver,
            "grid": "uniform",
            "num_steps": steps,
            "guidance_scale": 1.5,
            "weights": "ema-0.999",
            "seed": 0,
            "nfe": nfe,
            "accuracy": 0.99 - 0.2 / nfe,
            "frechet_distance": distance(arm, seed, nfe),
            "kernel_distance": 0.1 * distance(arm, seed, nfe) - 0.04,
            "seconds": 0.1 * nfe,
        }
        for solver, calls in (("ddim", 2), ("heun", 4))
        for steps in STEPS
        for nfe in [calls * steps - (2 if solver == "heun" else 0)]
    ]
    return {
        "step": 1200,
        "weights": "ema-0.999",
        "sampling": {
            "solver": "heun",
            "grid": "Power()",
            "grid_name": "uniform",
            "num_steps": 9,
            "nfe": 34,
            "guidance_scale": 1.5,
            "seed": 0,
            "noise_seed": 1000 * seed,
        },
        "accuracy": 0.985,
        "accuracy_provenance": PROVENANCE,
        "classifier_test_accuracy": 0.994,
        "precision": {
            "value": round(0.8 + 0.01 * seed, 2),
            "floor": 0.96,
            "provenance": PROVENANCE,
        },
        "cmmd": None,
        "neighbours": {"copied": 0.01, "copied_floor": 0.0, "provenance": {"seed": 0}},
        "extractors": {
            "inception:spatial": {
                "frechet_distance": {
                    "value": 10.0 * ARMS[arm],
                    "floor": 3.0,
                    "provenance": PROVENANCE,
                }
            }
        },
        "frechet_distance": {
            "value": distance(arm, seed, 34),
            "floor": 0.22,
            "provenance": PROVENANCE,
        },
        "by_nfe": rows,
    }


def probes(arm, seed):
    edges = [float(edge) for edge in range(-10, 11)]
    middles = np.array(edges[:-1]) + 0.5
    clean = 0.25 / (1 + 0.25 * np.exp(middles)) * (1 + 0.1 * ARMS[arm] + 0.02 * seed)
    scale = {"noise": np.exp(middles), "clean": np.ones(20), "v": 1 + np.exp(middles)}
    reached = middles > (-20 if arm != "ddpm" else -9)
    spaces = {
        name: {
            "by_log_snr": [
                {"mean": mean, "standard_error": 0.03 * mean} if inside else None
                for mean, inside in zip((clean * factor).tolist(), reached, strict=True)
            ]
        }
        for name, factor in scale.items()
    }
    levels = np.arange(-12, 12.25, 0.25)
    bins = [
        {"scale": 300.0, "low": 200.0, "high": None, "trace": 6.0,
         "squared_norm": 0.02 + 0.001 * seed, "examples": 256}
        for _ in range(10)
    ]  # fmt: skip
    noise = {"log_snr_edges": edges[::2], "bins": [None, *bins[1:]], "share": [0.1] * 10}
    return {
        "num_images": 256,
        "loss_by_log_snr": {"log_snr_edges": edges, "spaces": spaces},
        "effective_weight": {
            "log_snr": levels.tolist(),
            "weight": (0.2 / np.cosh(levels / 4 - ARMS[arm])).tolist(),
        },
        "gradient_noise": noise if arm != "ddpm" else {"left_out": "its loss couples the examples"},
    }


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def make_sweep(folder):
    """A finished sweep of three arms and three seeds, with real digits for samples."""
    cells = [
        {
            "name": f"{arm}-seed={seed}",
            "arm": arm,
            "axes": {"objective": arm, "config.seed": seed},
            "flags": [f"--config=configs/digits.py:objective={arm}", f"--config.seed={seed}"],
            "folder": f"{arm}-seed={seed}",
            "flops_per_step": 2.0e10,
            "num_steps": 1200,
        }
        for arm in ARMS
        for seed in SEEDS
    ]
    folder.mkdir(parents=True)
    sweep = {
        "name": "digits_seeds",
        "question": "Do three ways to train a flow differ on digits?",
        "command": "python -m experiments.sweep --sweep=configs/sweeps/digits_seeds.py",
        "config": "configs/digits.py",
        "shared": {"config.num_steps": "1200"},
        "matched": "steps",
        "cells": cells,
        "left_out": [{"name": "reflow", "reason": "needs pairs of images"}],
    }
    write(folder / "sweep.json", sweep)
    pixels, _ = load_digits(return_X_y=True)
    images = pixels[:40].reshape(-1, 8, 8, 1).astype(np.float32) / 8 - 1
    for cell in cells:
        arm, seed = cell["arm"], cell["axes"]["config.seed"]
        run = folder / cell["folder"]
        (run / "samples").mkdir(parents=True)
        write(run / "config.json", config(arm, seed))
        write(run / "run.json", {
            "command": f"python -m experiments.train {' '.join(cell['flags'])}",
            "versions": {"diffjax": "0.1.0", "jax": "0.10.2"},
            "git_revision": "3f2a91c0d4be",
            "device": "1 x cpu (cpu)",
            "host": "2 cores, x86_64, Linux",
            "train_seconds": 100.0 + 10 * seed + 40 * (arm == "edm"),
            "train_flops_per_step": 2.0e10 * (1 + (arm == "edm")),
        })  # fmt: skip
        write(run / "evaluation.json", evaluation(arm, seed))
        write(run / "probes.json", probes(arm, seed))
        write(run / "status.json", {"state": "done", "attempts": 1, "error": ""})
        noise = np.random.default_rng(seed).normal(size=images.shape)
        pictures.save_png(run / "samples" / "step_00000600.png", noise, columns=10)
        mixed = images + 0.2 * ARMS[arm] * noise
        pictures.save_png(run / "samples" / "step_00001200.png", mixed, columns=10)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_sweep(tmp_path_factory.mktemp("sweeps") / "digits_seeds")


@pytest.fixture
def sweep(made, tmp_path):
    """A copy of its own for a test that changes files."""
    return shutil.copytree(
        made, tmp_path / "digits_seeds", ignore=shutil.ignore_patterns("report*")
    )


@pytest.fixture(scope="module")
def finished(made):
    return write_sweep_report([made])


@pytest.fixture(scope="module")
def page(finished):
    return finished.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def content(finished):
    return json.loads(finished.with_name("report.json").read_text(encoding="utf-8"))


class Reader(HTMLParser):
    """Headings, text and everything that a browser would load; scripts are passed over."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.words, self.loaded, self.tags = [], [], [], []
        self._open = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._open.append(tag)
        self.loaded += [
            value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")
        ]

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self._open or "style" in self._open:
            return
        if "h2" in self._open:
            self.headings.append(data)
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def figures(page):
    (text,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page)
    return json.loads(text)


def test_the_verdict_comes_first_and_names_the_leader(page):
    text = Reader(page).text
    assert text.index("Do three ways to train a flow differ") < text.index("edm leads at")
    assert "2 of 2 other arms are worse" in text
    assert text.index("edm leads at") < text.index("Quality against network evaluations")
    assert page.index('class="verdict"') < page.index("<table")


def test_the_sections_are_in_their_order(page):
    assert Reader(page).headings == [
        "Quality against network evaluations", "All metrics at the runs' own recipes",
        "Quality against the cost of training",
        "Loss by log-SNR", "Gradient noise scale by log-SNR", "Samples", "Settings that differ",
        "Failed and left out", "How to reproduce it",
    ]  # fmt: skip


def test_means_and_intervals_are_students(content):
    values = [distance("edm", seed, 34) for seed in SEEDS]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
    row = content["verdict_rows"][0]
    assert (row["arm"], row["verdict"]) == ("edm", "leads")
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((np.mean(values), low, high))
    gap = np.array([distance("flow", seed, 34) for seed in SEEDS]) - values
    flow = next(row for row in content["verdict_rows"] if row["arm"] == "flow")
    assert flow["gap_mean"] == pytest.approx(gap.mean())
    assert flow["gap_low"] < gap.mean() < flow["gap_high"]
    (one,) = [
        row for row in content["quality"]
        if (row["arm"], row["solver"], row["num_steps"]) == ("edm", "heun", 9)
    ]  # fmt: skip
    assert one["frechet_distance"]["values"] == pytest.approx(values)
    assert (one["nfe"], one["runs"]) == (34, 3)


def test_sampling_seeds_are_averaged_before_training_seeds(sweep):
    for seed in SEEDS:
        path = sweep / f"flow-seed={seed}" / "evaluation.json"
        content = json.loads(path.read_text())
        more = [
            {**row, "seed": 1, "frechet_distance": row["frechet_distance"] + 0.2}
            for row in content["by_nfe"]
        ]
        write(path, {**content, "by_nfe": content["by_nfe"] + more})
    found = json.loads(write_sweep_report([sweep]).with_name("report.json").read_text())
    row = next(row for row in found["quality"] if row["arm"] == "flow" and row["nfe"] == 34)
    expected = [distance("flow", seed, 34) + 0.1 for seed in SEEDS]
    assert row["frechet_distance"]["values"] == pytest.approx(expected)


def test_the_pareto_front_is_what_nothing_beats(content):
    rows = content["quality"]
    for row in rows:
        beaten = any(
            other["nfe"] <= row["nfe"]
            and other["frechet_distance"]["mean"] < row["frechet_distance"]["mean"]
            for other in rows
        )
        assert row["pareto"] is not beaten
    assert pareto_front([], "frechet_distance") == []


def test_markdown_csv_and_json_agree(finished, content):
    table = list(csv.DictReader(io.StringIO(finished.with_name("report.csv").read_text())))
    assert len(table) == 9 * 6
    markdown = finished.with_name("report.md").read_text()
    for row in content["quality"]:
        same = [
            float(line["frechet_distance"]) for line in table
            if (line["arm"], line["solver"], line["num_steps"])
            == (row["arm"], row["solver"], str(row["num_steps"]))
        ]  # fmt: skip
        assert same == row["frechet_distance"]["values"]
        one = row["frechet_distance"]
        written = f"{one['mean']:#.3g} ({one['low']:#.3g} to {one['high']:#.3g})"
        assert re.search(rf"\| {row['arm']} \| {row['solver']} .*{re.escape(written)}", markdown)
    for row in content["verdict_rows"]:
        assert re.search(
            rf"\| {row['arm']} \| {row['mean']:#.3g} .*\| {row['verdict']} \|", markdown
        )
    assert {line["seed"] for line in table} == {"0", "1", "2"}
    assert {float(line["train_flops_per_step"]) for line in table} == {2e10, 4e10}
    assert [row["train_flops"] for row in content["cost"]][:4] == [2.4e13] * 3 + [4.8e13]


def test_every_line_of_a_plot_belongs_to_an_arm(page):
    found = figures(page)
    assert set(found) == {
        "frechet_distance", "kernel_distance", "accuracy", "train_flops", "train_seconds",
        "weights", "loss_relative", "loss_noise", "loss_clean", "loss_v", "noise",
    }  # fmt: skip
    assert {len(found[name]["data"]) for name in ("frechet_distance", "accuracy")} == {6}
    assert len(found["noise"]["data"]) == 2  # ddpm has none
    for figure in found.values():
        assert {trace["meta"]["arm"] for trace in figure["data"]} <= {0, 1, 2}
    assert set(re.findall(r'data-figure="(\w+)"', page)) == set(found)
    relative = found["loss_relative"]["data"]
    assert min(min(trace["y"]) for trace in relative) == pytest.approx(1.0)
    # The three currencies differ by a factor that all arms share.
    clean = [trace["y"] for trace in found["loss_clean"]["data"]]
    np.testing.assert_allclose(relative[0]["y"], np.divide(clean[0], clean[1]), rtol=1e-9)


def test_bars_reach_both_ends_of_the_interval(page, content):
    trace = figures(page)["frechet_distance"]["data"][0]
    row = next(
        row for row in content["quality"] if (row["arm"], row["nfe"]) == ("flow", trace["x"][0])
    )["frechet_distance"]
    up, down = (trace["error_y"][key][0] for key in ("array", "arrayminus"))
    assert (trace["y"][0] + up, trace["y"][0] - down) == pytest.approx((row["high"], row["low"]))


def test_settings_that_differ_and_nothing_else(content):
    found = {one["setting"]: one["values"] for one in content["config_differences"]}
    assert list(found) == ["path"]
    assert {one["value"]: one["arms"] for one in found["path"]} == {
        "Linear": ["flow"],
        "Cosine": ["edm", "ddpm"],
    }


def test_samples_are_of_one_seed_and_the_last_step(page, finished):
    expected = (finished.parent / "edm-seed=0" / "samples" / "step_00001200.png").read_bytes()
    assert base64.b64encode(expected).decode() in page
    assert page.count("data:image/png") == 3
    assert "all from the same noise and the same conditions" in page


def test_the_page_loads_nothing(page):
    loaded = Reader(page).loaded
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    assert not re.search(r"(url\(|@import)", re.sub(r"<script.*?</script>", "", page, flags=re.S))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src &#39;none&#39;")
    assert "http" not in policy
    assert "Plotly, Inc." in page  # the licence's notice travels with the library
    assert "MIT license" in page


@pytest.mark.thorough
def test_the_same_files_give_the_same_files(sweep, finished):
    names = ("report.html", "report.md", "report.csv", "report.json")
    first = [(write_sweep_report([sweep]).with_name(name)).read_bytes() for name in names]
    second = [(write_sweep_report([sweep]).with_name(name)).read_bytes() for name in names]
    assert first == second


def test_what_comes_from_files_is_text(sweep):
    text = (sweep / "sweep.json").read_text()
    content = json.loads(text)
    content |= {"question": EVIL, "name": EVIL, "command": EVIL}
    content["cells"][0] |= {"arm": EVIL, "name": EVIL}
    content["left_out"] = [{"name": EVIL, "reason": EVIL}]
    write(sweep / "sweep.json", content)
    folder = sweep / "flow-seed=0"
    write(folder / "config.json", {"seed": 0, EVIL: EVIL, "path": {"_target_": EVIL}})
    write(folder / "run.json", {"git_revision": EVIL, "command": EVIL, "versions": {EVIL: EVIL}})
    measured = json.loads((folder / "evaluation.json").read_text())
    measured["by_nfe"][0] |= {"solver": EVIL, "grid": EVIL, "weights": EVIL}
    write(folder / "evaluation.json", measured)
    write(folder / "probes.json", {"loss_by_log_snr": {"left_out": EVIL}})
    (sweep / "edm-seed=1" / "evaluation.json").unlink()
    write(sweep / "edm-seed=1" / "status.json", {"state": "failed", "attempts": 2, "error": EVIL})
    page = write_sweep_report([sweep])
    text = page.read_text()
    assert Reader(text).tags.count("script") == 3
    assert "<script>alert" not in text
    assert "alert" in Reader(text).text
    markdown = page.with_name("report.md").read_text().splitlines()
    # Commands are code, indented: there a tag is text.
    assert not any("<script" in line for line in markdown if not line.startswith("    "))
    hover = figures(text)["frechet_distance"]["data"][0]["customdata"][0]
    assert "<script" not in hover
    # In a Markdown table no cell ends before its end.
    tables = [line for line in markdown if line.startswith("|")]
    assert not any("|'" in line.replace("\\|", "") for line in tables)


def test_of_several_grids_with_one_noise_seed_the_runs_own_counts(sweep):
    for path in sweep.glob("*/evaluation.json"):
        content = json.loads(path.read_text())
        other = [
            {**row, "grid": "karras", "frechet_distance": 0.5 * row["frechet_distance"]}
            for row in content["by_nfe"]
        ]
        write(path, {**content, "by_nfe": content["by_nfe"] + other})
    found = json.loads(write_sweep_report([sweep]).with_name("report.json").read_text())
    assert "needs a second noise seed" in found["rule"]
    expected = np.mean([distance("edm", seed, 34) for seed in SEEDS])
    assert found["verdict_rows"][0]["mean"] == pytest.approx(expected)
    assert {row["grid"] for row in found["quality"]} == {"uniform", "karras"}


def test_failures_and_left_out_cells_have_their_reasons(sweep):
    failed, waiting = sweep / "flow-seed=1", sweep / "edm-seed=2"
    running, damaged = sweep / "ddpm-seed=0", sweep / "ddpm-seed=1"
    (failed / "evaluation.json").unlink()
    write(failed / "status.json", {"state": "failed", "attempts": 3, "error": "loss is not finite"})
    shutil.rmtree(waiting)
    (running / "evaluation.json").unlink()
    write(running / "status.json", {"state": "running", "attempts": 1, "error": ""})
    (damaged / "probes.json").write_text("{torn")
    # Probes come last: what fails there is evaluated, and failed all the same.
    write(sweep / "edm-seed=0" / "status.json", {"state": "failed", "error": "probe broke"})
    page = write_sweep_report([sweep])
    text = Reader(page.read_text()).text
    assert "flow-seed=1 failed, 3 attempts loss is not finite" in text
    assert "edm-seed=2 waiting" in text
    assert "ddpm-seed=0 running" in text
    assert "probes.json is not valid JSON" in text
    assert "edm-seed=0 failed" in text
    assert "probe broke" in text
    assert "reflow left out needs pairs of images" in text
    assert "--sweep=configs/sweeps/digits_seeds.py" in text
    found = json.loads(page.with_name("report.json").read_text())
    assert {row["name"] for row in found["unfinished"]} == {
        "flow-seed=1", "edm-seed=2", "ddpm-seed=0", "ddpm-seed=1", "edm-seed=0",
    }  # fmt: skip
    # No arm is called worse on fewer seeds than another has.
    assert not any(row["verdict"] == "worse" for row in found["verdict_rows"])


def test_the_first_sentence_says_that_an_arm_is_incomplete(sweep):
    """And does not let it lead, though its mean is the least."""
    (sweep / "edm-seed=2" / "evaluation.json").unlink()
    text = Reader(write_sweep_report([sweep]).read_text()).text
    assert "flow leads at a Fréchet distance" in text
    assert "1 of 2 other arms is worse, 1 incomplete and not compared." in text
    assert "incomplete: 2 of 3 seeds evaluated" in text


def test_noise_that_all_training_seeds_shared_is_told(sweep):
    """As of an earlier version, whose verdicts were too sure."""
    assert "its own noise" in Reader(write_sweep_report([sweep]).read_text()).text
    path = sweep / "edm-seed=2" / "evaluation.json"
    content = json.loads(path.read_text())
    del content["sampling"]["noise_seed"]
    write(path, content)
    text = Reader(write_sweep_report([sweep]).read_text()).text
    assert "were evaluated from one noise, by an earlier version" in text


def test_an_evaluation_on_the_way_is_not_compared_with_finished_ones(sweep):
    path = sweep / "edm-seed=2" / "evaluation.json"
    write(path, {**json.loads(path.read_text()), "step": 600})
    page = write_sweep_report([sweep])
    assert "evaluation.json is of step 600 of 1200: not compared" in Reader(page.read_text()).text
    rows = json.loads(page.with_name("report.json").read_text())["verdict_rows"]
    assert {r["arm"]: r["verdict"] for r in rows}["edm"] == "incomplete: 2 of 3 seeds evaluated"


def test_arms_of_unlike_seeds_are_paired_by_those_they_share(sweep):
    """Any set of folders has a page: one arm lacks a seed, another one has a seed of its own."""
    lacking = sweep / "flow-seed=2"
    shutil.rmtree(lacking)
    own = sweep / "ddpm-seed=0" / "config.json"
    write(own, {**json.loads(own.read_text()), "seed": 9})
    folders = [path for path in sweep.iterdir() if path.is_dir()]
    page = write_sweep_report(folders, sweep / "page.html")
    rows = json.loads(page.with_name("report.json").read_text())["verdict_rows"]
    found = {r["arm"]: (r["verdict"], r["seeds"]) for r in rows}
    assert found["edm"] == ("leads", 3)
    assert found["flow"][1] == 2
    # Seeds 1 and 2 of the others are used too.
    assert found["flow"][0].startswith(("worse", "inconclusive"))
    assert found["ddpm"][0].startswith(("worse", "inconclusive"))


def test_all_numbers_stand_side_by_side_in_each_file(content, page, finished):
    rows = {row["name"]: row for row in content["numbers"]}
    assert list(rows) == [
        "frechet_distance", "precision", "accuracy", "copied",
        "frechet_distance (inception:spatial)",
    ]  # fmt: skip
    low, high = scipy.stats.t.interval(0.95, 2, 0.81, scipy.stats.sem([0.8, 0.81, 0.82]))
    found = rows["precision"]["arms"]["edm"]
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.81, low, high))
    assert (rows["precision"]["floor"], rows["copied"]["floor"]) == (0.96, 0.0)
    words = " ".join(Reader(page).words)
    markdown = finished.with_name("report.md").read_text()
    for text in ("Fréchet distance (inception:spatial)", f"{low:.3f} to {high:.3f}"):
        assert text in words
        assert text in markdown
    lines = list(csv.DictReader(io.StringIO(finished.with_name("report.csv").read_text())))
    own = [line for line in lines if line["own_recipe"] == "yes"]
    assert [line["run"] for line in own] == [f"{arm}-seed={seed}" for arm in ARMS for seed in SEEDS]
    assert {float(line["precision"]) for line in own} == {0.8, 0.81, 0.82}
    assert {line["frechet_distance (inception:spatial)"] for line in own} == {"4.0", "5.0", "24.0"}
    assert not any(line["precision"] for line in lines if line["own_recipe"] != "yes")
    assert content["provenance"]["extractor sha256"] == {"9f" * 32: 9}


def test_bits_per_dimension_are_read_from_beside_the_evaluation(sweep):
    for run in sweep.glob("*-seed=*"):
        result = {"bits_per_dim": 2.5, "method": "vlb", "num_times": 64, "step": 3, "seconds": 1.0}
        write(run / "likelihood.json", {"vlb-none": result})
    page = write_sweep_report([sweep])
    row = json.loads(page.with_name("report.json").read_text())["numbers"][4]
    assert (row["label"], row["incomparable"]) == ("bits per dimension (vlb-none)", "")
    assert row["arms"]["flow"]["values"] == [2.5, 2.5, 2.5]
    write(sweep / "flow-seed=0" / "likelihood.json", {"vlb-none": {**result, "num_times": 4}})
    rows = json.loads(write_sweep_report([sweep]).with_name("report.json").read_text())["numbers"]
    assert "num_times is 4 and 64" in rows[4]["incomparable"]
    assert rows[4]["arms"]["flow"] is None


def test_each_number_is_refused_by_its_own_provenance(sweep):
    path = sweep / "edm-seed=0" / "evaluation.json"
    content = json.loads(path.read_text())
    content["precision"]["provenance"] = {**PROVENANCE, "k": 3}
    write(path, content)
    page = write_sweep_report([sweep])
    rows = {r["name"]: r for r in json.loads(page.with_name("report.json").read_text())["numbers"]}
    assert "k is not stated and 3" in rows["precision"]["incomparable"]
    assert rows["precision"]["arms"]["flow"] is None
    assert rows["accuracy"]["arms"]["flow"]["mean"] == pytest.approx(0.985)
    assert "k is not stated and 3" in Reader(page.read_text()).text
    assert "edm leads at" in page.read_text()


def test_distances_measured_in_unlike_ways_are_not_compared(sweep):
    path = sweep / "edm-seed=0" / "evaluation.json"
    content = json.loads(path.read_text())
    content["frechet_distance"]["provenance"] = {**PROVENANCE, "num_samples": 50}
    write(path, content)
    page = write_sweep_report([sweep])
    text = Reader(page.read_text()).text
    assert "num_samples is 1000 and 50" in text
    assert "leads" not in text
    cost = json.loads(page.with_name("report.json").read_text())["cost"]
    assert {row["frechet_distance"] for row in cost} == {None}


def test_an_empty_sweep_says_what_to_run(sweep):
    for cell in json.loads((sweep / "sweep.json").read_text())["cells"]:
        folder = sweep / cell["folder"]
        for name in ("evaluation.json", "probes.json", "run.json", "status.json"):
            (folder / name).unlink()
        for picture in (folder / "samples").glob("*.png"):
            picture.unlink()
    page = write_sweep_report([sweep])
    text = Reader(page.read_text()).text
    assert "No run has a Fréchet distance to compare yet" in text
    assert f"python -m experiments.probe --workdir={sweep}/flow-seed=0" in text
    assert f"python -m experiments.evaluate --workdir={sweep}/flow-seed=0" in text
    assert "FLOPs are unknown" in text
    assert "No sample grids yet" in text
    assert figures(page.read_text()) == {}


def test_folders_without_a_sweep_are_grouped_by_their_configs(sweep, tmp_path):
    (sweep / "sweep.json").unlink()
    assert read_sweep([sweep]).arms == ["ddpm", "edm", "flow"]
    two = [sweep / "flow-seed=0", sweep / "edm-seed=0"]
    files = read_sweep(two)
    assert files.arms == ["flow-seed=0", "edm-seed=0"]
    with pytest.raises(UserError, match="--out is missing"):
        write_sweep_report(two)
    for out in (None, two[0]):  # A run has a page of its own there.
        with pytest.raises(UserError, match="is a run and has its own report"):
            write_sweep_report(two[:1], out)
    page = write_sweep_report(two, tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    assert "one seed: no verdict" in page.read_text()


def test_the_command(sweep, tmp_path, capsys):
    def run(*argv):
        return cli.run(report.main, report.FLAGS, usage=report.USAGE, argv=argv)

    assert run(f"--workdir={sweep}") == 0
    assert capsys.readouterr().out == f"open {sweep / 'report.html'}\n"
    both = f"{sweep}/flow-seed=0,{sweep}/edm-seed=0"
    assert run(f"--workdir={both}", f"--out={tmp_path / 'out'}") == 0
    assert run(f"--workdir={tmp_path / 'none'}") == 2
    assert run(f"--workdir={both},{sweep}/edm-seed=0", "--out=x") == 2
    assert "listed twice" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(f"--workdir={tmp_path / 'empty'}") == 2
    assert "there is no run in" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{", '{"cells": 3}', '{"cells": [{"arm": "a"}]}'])
def test_a_damaged_sweep_file_is_one_line(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UserError, match=r"sweep\.json"):
        write_sweep_report([tmp_path])


def test_plotly_is_the_published_file():
    """Its hash, so that nobody edits it unnoticed; LICENSE lies beside it."""
    folder = Path(plots.__file__).parent / "plotly"
    text = (folder / "plotly-basic.min.js").read_text(encoding="utf-8")
    assert "plotly.js (basic - minified) v4.1.1" in text[:200]
    assert "</script" not in text
    assert "MIT License" in (folder / "LICENSE").read_text()
