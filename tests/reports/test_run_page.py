"""The page of a run: whole, self-contained, safe, and of use while parts of the run are missing."""

import io
import json
import re
import shutil
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from diffjax.errors import UserError
from diffjax.evaluation.tables import quality_table
from diffjax.reports import pictures, plots
from diffjax.reports.run_page import write_report

CONFIG = {
    "name": "digits",
    "seed": 0,
    "num_steps": 4000,
    "batch_size": 128,
    "data": {"_target_": "diffjax.data.sources:digits"},
    "path": {"_target_": "diffjax.process.paths:Linear", "t_clean": 0.0, "t_noise": 1.0},
    "precond": {
        "_target_": "diffjax.process.precond:Precond",
        "target": {"_target_": "diffjax.process.targets:Velocity"},
        "noise_label": {"_target_": "diffjax.process.precond:TimeLabel", "scale": 1000.0},
    },
    "objective": {
        "_target_": "diffjax.objectives.denoising:Denoising",
        "weight": {"_target_": "diffjax.process.weights:MinSNR", "gamma": 5.0},
        "times": {"_target_": "diffjax.process.times:LogitNormal", "mean": 0.0, "std": 1.0},
    },
    "model": {
        "_target_": "diffjax.models.dit.network:DiT",
        "patch_size": 2,
        "hidden_size": 128,
        "depth": 4,
        "num_heads": 4,
        "attention": "auto",
    },
    "optimizer": {
        "_target_": "diffjax.optimizers.descent:descent",
        "rule": {"_target_": "diffjax.optimizers.adam:AdamW"},
        "learning_rate": 0.001,
        "warmup_steps": 200,
    },
    "ema_decays": [0.99, 0.999],
    "condition_dropout": 0.1,
}
RUN = {
    "command": ["python", "-m", "experiments.train", "--config=configs/digits.py:model=dit"],
    "git_revision": "3f2a91c0d4be",
    "device": "1 x cpu (cpu)",
    "host": "2 cores, x86_64, Linux",
    "num_params": 1_094_532,
    "train_seconds": 161.2,
    "compile_seconds": 12.34,
    "data": {"name": "digits", "num_train_images": 1437},
    "versions": {"python": "3.11.9", "jax": "0.10.2", "flax": "0.12.8", "diffjax": "0.1.0"},
}
EDGES = ("-inf", "-8", "-6", "-4", "-2", "0", "2", "4", "6", "8")


def _provenance():
    return {
        "extractor": "classifier:digits",
        "extractor_sha256": "9f" * 32,
        "value_range": "[-1,1]",
        "rounding": "uint8",
        "reference": "digits/train",
        "reference_sha256": "41" * 32,
        "num_reference_images": 1437,
        "num_samples": 1000,
    }


def _evaluation() -> dict[str, Any]:
    rows = [
        {
            "solver": solver,
            "num_steps": steps,
            "nfe": nfe,
            "guidance_scale": 2.0,
            "accuracy": 0.995 - 0.5 / nfe,
            "frechet_distance": 1.3 + 60.0 / nfe**1.5,
            "kernel_distance": 0.004 + 0.5 / nfe**1.5,
            "seconds": 0.02 * nfe,
        }
        for solver, calls in (("ddim", 2), ("heun", 4))
        for steps in (2, 5, 10, 20, 50)
        for nfe in [steps * calls - (2 if solver == "heun" else 0)]
    ]
    distance = {"value": 1.342, "floor": 0.981, "provenance": _provenance()}
    kernel = {"value": 0.0041, "standard_error": 0.0006, "floor": 0.0012}
    sampling = {"solver": "heun", "grid": "uniform", "num_steps": 18, "nfe": 70}
    return {
        "step": 4000,
        "weights": "ema 0.999",
        "sampling": sampling | {"guidance_scale": 2.0, "seed": 0},
        "accuracy": 0.992,
        "accuracy_interval": [0.984, 0.996],
        "classifier_test_accuracy": 0.989,
        "frechet_distance": distance,
        "kernel_distance": kernel | {"provenance": _provenance()},
        "neighbours": {"median_distance_ratio": 1.04, "share_closer_than_test": 0.021},
        "num_samples": 1000,
        "seconds": 21.4,
        "by_nfe": rows,
    }


def _metrics(num_steps=4000, every=10):
    random = np.random.default_rng(0)
    for step in range(every, num_steps + 1, every):
        noise = np.exp(0.12 * random.normal(size=len(EDGES) + 1))
        level = 0.12 + 1.1 * np.exp(-step / 350)
        by_bin = {
            f"loss_by_log_snr/{edge}": level * noise[i] * (0.3 + 0.25 * abs(i - 4))
            for i, edge in enumerate(EDGES)
            if i or step % 70 == 0  # the outermost bin is often empty
        }
        yield {"step": step, "loss": level * noise[-1], "images_per_second": 4100.0, **by_bin}


def make_run(folder):
    """A finished run as training and evaluation leave it, with real digits for samples."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "evaluation.json").write_text(json.dumps(_evaluation()))
    lines = [json.dumps(record) + "\n" for record in _metrics()]
    (folder / "metrics.jsonl").write_text("".join(lines))
    pixels, labels = load_digits(return_X_y=True)
    chosen = np.concatenate([np.flatnonzero(labels == n)[:8] for n in range(10)])
    clean = pixels[chosen].reshape(-1, 8, 8, 1).astype(np.float32) / 8 - 1
    noise = np.random.default_rng(0).normal(size=clean.shape).astype(np.float32)
    for step in range(0, 4001, 250):
        mix = np.exp(-step / 500)
        images = (1 - mix) * clean + mix * noise
        pictures.save_png(folder / "samples" / f"step_{step:08d}.png", images, columns=8)
    pictures.save_png(folder / "samples" / "neighbours.png", clean[:72], columns=6)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with its page, for tests that read."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "digits")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(finished):
    return _read(finished / "report.html")


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of its own for a test that changes files."""
    return shutil.copytree(finished, tmp_path / "digits")


class _Page(HTMLParser):
    """Text, tags and attributes of a page; complains of elements that aren't closed in order."""

    VOID = frozenset({"meta", "img", "br", "hr", "link"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style", "script"):
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def _read(path):
    return _Page(path.read_text(encoding="utf-8"))


def test_the_page_says_what_a_reader_asks_first(finished, page):
    for words in (
        "99.2 % of 1,000 conditional samples recognised; Fréchet distance 1.34 (floor 0.981) "
        "at 70 NFE.",
        "Linear t_clean 0.0 · t_noise 1.0",
        "MinSNR gamma 5.0",
        "Velocity",
        "1,094,532",
        "4,000 of 4,000",
        "128 images",
        "1 x cpu (cpu)",
        "2 min 41 s training, 12.3 s compiling",
        "95 % interval 98.4 % to 99.6 %",
        "4,100 images/s",
        "python -m experiments.train --config=configs/digits.py:model=dit",
        "3f2a91c0d4be",
        "0.10.2",
        "9f" * 32,
        "median distance ratio 1.04",
    ):
        assert words in page.words
    headings = re.findall(r"<h2>(.*?)</h2>", finished.joinpath("report.html").read_text())
    assert headings[:3] == ["Samples over training", "Loss", "Quality against network evaluations"]
    assert page.tags.count("svg") == 5
    assert "not finite" not in page.words


def test_the_page_asks_for_nothing_outside_itself(finished, page):
    text = finished.joinpath("report.html").read_text(encoding="utf-8")
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    resources = {"src", "srcset", "href", "xlink:href", "poster", "background", "action"}
    for name, value in page.attributes:
        if name in resources:
            assert value.startswith(("data:image/png;base64,", "#")), value[:80]
    assert all(url.startswith("#") for url in re.findall(r"url\(['\"]?([^)]*)", text))
    assert "@import" not in text


def test_ids_are_unique_and_references_find_theirs(finished, page):
    text = finished.joinpath("report.html").read_text(encoding="utf-8")
    defined = [value for name, value in page.attributes if name == "id"]
    assert len(defined) == len(set(defined))
    assert set(re.findall(r"(?:url\(|href=\")#([\w.-]+)", text)) <= set(defined)


def test_seven_grids_from_the_first_to_the_last(page):
    shown = re.findall(r"step ([\d,]+) ", page.words.split("Samples over training")[1])[:7]
    assert (shown[0], shown[-1]) == ("0", "4,000")
    assert len(set(shown)) == 7
    assert page.tags.count("img") == 8  # and the neighbours


@pytest.mark.thorough
def test_the_same_files_give_the_same_page(finished, workdir):
    """But for the folder's name, which is in commands."""
    first = (workdir / "report.html").read_text(encoding="utf-8")
    found = write_report(workdir).read_text(encoding="utf-8")
    assert found == first.replace(finished.as_posix(), workdir.as_posix())
    assert not list(workdir.glob("*.tmp"))


@pytest.fixture(scope="module")
def scant(finished, tmp_path_factory):
    """The page of a run without a classifier, whose loss was once infinite."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("scant") / "digits")
    evaluation = _evaluation()
    evaluation["accuracy"] = None
    evaluation["by_nfe"] = [row | {"accuracy": None} for row in evaluation["by_nfe"]]
    counts = {"num_samples": 500, "num_floor_images": 359, "num_reference_images": 500}
    provenance = _provenance() | counts | {"definition": "arXiv:1904.06991", "k": 5}
    evaluation["recall"] = {"value": 0.8412, "floor": 0.98, "provenance": provenance}
    evaluation["density"] = None
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    _append(folder, {"step": 4010, "loss": "inf", "loss_by_log_snr/8": "inf"})
    return _read(write_report(folder))


def _append(folder, record):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def test_a_number_has_its_error_its_counts_and_what_it_alone_was_measured_with(scant):
    words = scant.words
    assert "kernel distance 0.00410 ± 0.00060 0.00120 1,000 1,437 –" in words
    assert "recall 0.841 0.980 500 500 359 arXiv:1904.06991 · k 5" in words
    assert "density" not in words
    # What all have in common is printed once.
    assert words.count("9f" * 32) == words.count("extractor classifier:digits") == 1


def test_without_a_classifier_the_verdict_is_the_distance(scant):
    assert "recognised" not in scant.words
    assert "Fréchet distance 1.34 (floor 0.981) at 70 NFE." in scant.words
    assert scant.tags.count("svg") == 4


def test_an_infinite_loss_is_marked(scant):
    assert "not finite" in scant.words


def test_markup_in_the_files_is_only_text(workdir):
    """In all places at once, each with words of its own."""

    def attack(place):
        return f'<script>alert("{place}")</script>'

    config, run, evaluation = dict(CONFIG), dict(RUN), _evaluation()
    config["model"] = {
        "_target_": f"m:{attack('target')}",
        "name": attack("config value"),
        "list": [attack("config list")],
    }
    config[attack("config key")] = 1
    run |= {"device": attack("device"), "command": attack("command")}
    run["versions"] = {attack("version"): attack("version of")}
    run["data"] = run["data"] | {"name": attack("data"), "label_names": [attack("label")] * 10}
    evaluation["weights"] = attack("weights")
    evaluation["frechet_distance"]["provenance"]["extractor"] = attack("extractor")
    evaluation["neighbours"] = {attack("neighbour"): attack("distance")}
    evaluation["by_nfe"] = [row | {"solver": attack("solver")} for row in evaluation["by_nfe"]]
    for name, content in (("config", config), ("run", run), ("evaluation", evaluation)):
        (workdir / f"{name}.json").write_text(json.dumps(content))
    # A slash in the name of a folder is the border of two.
    outer, _, inner = attack("folder").rpartition("/")
    (workdir.parent / outer).mkdir()
    path = write_report(workdir.rename(workdir.parent / outer / inner))
    assert "<script" not in path.read_text(encoding="utf-8")
    words = _read(path).words.replace("\\u003c", "<").replace("\\u003e", ">")
    words = words.replace('\\"', '"')
    for place in (
        "target", "config value", "config list", "config key", "device", "command", "version",
        "version of", "data", "label", "weights", "extractor", "neighbour", "distance", "solver",
    ):  # fmt: skip
        assert attack(place) in words, place
    assert inner in words


def test_missing_files_become_sentences(workdir):
    for file in ("config.json", "metrics.jsonl", "samples/neighbours.png"):
        (workdir / file).unlink()
    words = _read(write_report(workdir)).words
    assert "There is no config.json" in words
    assert "No losses yet" in words
    assert "No nearest training images yet" in words
    assert "4,000" in words  # the rest is still there
    assert "Not evaluated yet" not in words
    assert "there is no run.json" not in words


def test_a_run_under_way_says_how_far_it_is(workdir):
    """And marks a loss that was no number."""
    for file in ("run.json", "evaluation.json"):
        (workdir / file).unlink()
    lines = ['{"step": 1190, "loss": "nan", "loss_by_log_snr/8": "nan"}']
    lines += ['{"step": 1200, "loss": 0.4}', '{"step": 12']
    (workdir / "metrics.jsonl").write_text("\n".join(lines))
    words = _read(write_report(workdir)).words
    assert "Trained to step 1,200 of 4,000; not evaluated yet." in words
    assert "there is no run.json" in words
    assert "Not evaluated yet: python -m experiments.evaluate --workdir=" in words
    assert "not finite" in words


def test_an_empty_folder_says_how_to_begin(tmp_path):
    words = _read(write_report(tmp_path)).words
    assert "Not trained yet." in words
    assert "No sample grids yet" in words
    assert f"python -m experiments.evaluate --workdir={tmp_path.as_posix()}" in words


def test_no_folder_is_an_error_and_makes_none(tmp_path):
    with pytest.raises(UserError, match=r"there is no run in .*absent"):
        write_report(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_a_damaged_file_is_named_and_the_old_page_kept(workdir):
    before = (workdir / "report.html").read_bytes()
    for file in ("config.json", "run.json", "evaluation.json"):
        whole = (workdir / file).read_bytes()
        for content in ('{"step": 1', "[1]", "\x00"):
            (workdir / file).write_text(content)
            with pytest.raises(UserError, match=re.escape(file)):
                write_report(workdir)
            assert (workdir / "report.html").read_bytes() == before, (file, content)
        (workdir / file).write_bytes(whole)


def test_a_damaged_picture_is_named(workdir):
    grid = workdir / "samples" / "step_00004000.png"
    grid.write_bytes(grid.read_bytes()[:300])
    with pytest.raises(UserError, match=r"step_00004000\.png"):
        write_report(workdir)


@pytest.mark.parametrize("records", [[], [{"step": 1}], [{"step": 1, "loss": float("nan")}]])
def test_nothing_to_draw_draws_nothing(records):
    assert plots.loss_curve(records) == ""
    assert plots.plot_loss_by_log_snr(records) == ""
    assert plots.quality_against_nfe(records) == ""


def test_a_loss_of_one_line_is_a_visible_point():
    one = [{"step": 5, "loss": 2.0, "loss_by_log_snr/0": 2.0}]
    two = [*one, {"step": 10, "loss": 1.0, "loss_by_log_snr/0": 1.0}]
    circle = re.compile(r'<path id="[\w-]+" d="M 0 3\s+C ')
    for plot in (plots.loss_curve, plots.plot_loss_by_log_snr):
        assert [bool(circle.search(plot(rows))) for rows in (one, two)] == [True, False]


def test_a_curve_passes_through_its_points():
    rows = [{"solver": "heun", "nfe": n, "frechet_distance": v} for n, v in [(2, 9.0), (8, 3.0)]]
    svg = plots.quality_against_nfe(rows, floor=3.0)
    lines = [
        np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path), float)
        for path in re.findall(r'<path d="([^"]*)" clip-path', svg)
    ]
    curve = next(line for line in lines if len(line) == 2 and np.ptp(line, axis=0).min() > 1)
    floor = [line for line in lines if len(line) == 2 and np.ptp(line[:, 1]) == 0][-1]
    assert curve[1, 1] == pytest.approx(floor[0, 1])  # the floor is at the height of the best
    assert curve[0, 1] < curve[1, 1]  # and worse is higher up


def test_smoothing_keeps_a_straight_line_and_a_constant():
    line = np.linspace(3.0, 1.0, 777)
    np.testing.assert_allclose(plots._smooth(line), line, rtol=1e-12)
    noisy = line + np.random.default_rng(0).normal(size=line.size)
    assert np.std(plots._smooth(noisy) - line) < 0.4  # of 1; 31 points share a window


def test_log_snr_bins_are_sorted_as_numbers():
    records = [{"step": 1, "loss_by_log_snr/8": 1.0}, {"step": 2, "loss_by_log_snr/-inf": 1.0}]
    records.append({"step": 3, "loss_by_log_snr/-2": 1.0})
    assert plots.log_snr_edges(records) == ["-inf", "-2", "8"]


@pytest.mark.parametrize(("size", "scale"), [(8, 6), (28, 2), (32, 2), (48, 1), (64, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_grid_geometry_is_exact(size, scale, channels):
    random = np.random.default_rng(size)
    images = random.integers(0, 256, (5, size, size, channels), np.uint8)
    grid = pictures.image_grid(images, columns=3)
    pitch = size * scale + 2
    assert grid.shape == (2 * pitch - 2, 3 * pitch - 2, channels)
    assert grid.dtype == np.uint8
    seen = np.zeros(grid.shape[:2], bool)
    for index, image in enumerate(images):
        top, left = pitch * (index // 3), pitch * (index % 3)
        window = slice(top, top + size * scale), slice(left, left + size * scale)
        for row in range(scale):
            for column in range(scale):
                assert np.array_equal(grid[window][row::scale, column::scale], image)
        seen[window] = True
    assert (grid[~seen] == 128).all()


def test_floats_become_the_nearest_of_256_levels():
    levels = np.arange(256, dtype=np.uint8)
    exact = levels / 127.5 - 1
    images = np.concatenate([exact, [-7.0, 7.0]]).reshape(258, 1, 1, 1)
    grid = pictures.image_grid(np.repeat(images, 48, axis=2), columns=1)
    assert grid[::3, 0, 0].tolist() == [*range(256), 0, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_grid(tmp_path, channels):
    images = np.random.default_rng(0).uniform(-1, 1, (7, 8, 8, channels)).astype(np.float32)
    path = pictures.save_png(tmp_path / "new" / "grid.png", images, columns=4)
    read = np.asarray(Image.open(io.BytesIO(path.read_bytes())))
    assert np.array_equal(read.reshape(98, 198, channels), pictures.image_grid(images, 4))
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


@pytest.mark.parametrize("shape", [(8, 8, 1), (4, 8, 8, 0), (0, 8, 8, 1)])
def test_what_is_not_a_picture_is_refused(shape):
    with pytest.raises(UserError, match=re.escape(str(list(shape)))):
        pictures.image_grid(np.zeros(shape), columns=2)


def test_of_latents_three_channels_are_shown():
    latents = np.random.default_rng(0).uniform(-1.0, 1.0, (4, 8, 8, 4))
    grid = pictures.image_grid(latents, columns=2)
    np.testing.assert_array_equal(grid, pictures.image_grid(latents[..., :3], columns=2))


def test_quality_table_is_aligned_and_sorted_by_nfe_within_the_solver():
    rows = _evaluation()["by_nfe"]
    lines = quality_table(rows[::-1]).splitlines()
    assert len({len(line) for line in lines}) == 1
    order = [(line.split()[0], int(line.split()[2])) for line in lines[1:]]
    assert order == sorted(order)
    assert len(order) == len(rows)


def test_quality_table_leaves_out_what_no_row_has():
    rows = [row | {"accuracy": None} for row in _evaluation()["by_nfe"]]
    assert "accuracy" not in quality_table(rows)


@pytest.mark.parametrize("accuracies", [(0.501, 0.503), (0.998, 1.0)])
def test_small_differences_in_accuracy_do_not_fill_the_axis(accuracies):
    rows = [
        {"solver": "heun", "nfe": nfe, "accuracy": accuracy}
        for nfe, accuracy in zip((2, 8), accuracies, strict=True)
    ]
    svg = plots.quality_against_nfe(rows, metric="accuracy")
    labels = [float(text) for text in re.findall(r">([\d.]+) %<", svg)]
    assert max(labels) - min(labels) > 2
    assert max(labels) <= 100
