"""The validation loss, compared with closed forms for Gaussian data."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import config_files
from diffjax.conditions import of_classes
from diffjax.errors import UserError
from diffjax.oracle.analytic import Gaussian
from diffjax.process import paths, schedules, targets
from diffjax.process.paths import Pair, coeffs
from diffjax.process.precond import LogSNRLabel, Precond, denoiser
from diffjax.runs.load import Run
from diffjax.runs.samples.model import Programs
from diffjax.spec import spec
from diffjax.studies import validation
from diffjax.studies.validation import loss_by_log_snr
from diffjax.training.sharding import make_mesh
from diffjax.wiring import wire
from experiments import validate
from experiments.flags import cli
from tests.support.tiny_network import Tiny

VARIANCES = np.array([2.0, 0.5, 0.1])
MEAN = np.array([0.3, 0.0, -0.5])
DATA: Any = Gaussian(cast(Any, MEAN), cast(Any, np.diag(VARIANCES)))
IMAGES = np.random.default_rng(0).normal(MEAN, np.sqrt(VARIANCES), (1000, 3)).astype(np.float32)
LABELS = np.zeros(1000, np.int32)
KEY = jax.random.key(1)
EDGES = (-6.0, -3.0, 0.0, 2.0)
SPACES = {
    "noise": targets.Noise(), "clean": targets.Clean(), "v": targets.V(),
    "velocity": targets.Velocity(), "score": targets.Score(), "f": targets.F(),
}  # fmt: skip
PATHS = {
    "linear": paths.Linear(), "cosine": paths.Cosine(), "ddpm": paths.LinearBeta(),
    "sub_vp": schedules.SubVP(), "ve": schedules.VarianceExploding(), "edm": schedules.EDM(),
}  # fmt: skip
CONFIG = Path(__file__).parents[2] / "configs" / "digits.py"


def measured(predict, path, **options):
    options = {"spaces": SPACES, "edges": EDGES, "batch_size": 1000} | options
    return loss_by_log_snr(predict, path, IMAGES, LABELS, KEY, **options)


@pytest.fixture(scope="module")
def oracle():
    return measured(DATA.predict(paths.Linear()), paths.Linear())


def factors(levels):
    """Squared error per squared error of x0 at log-SNRs, from each target's own definition.

    On a variance-preserving path with a = cos(πt/2): x0 = a·x_t - s·v, and the velocity is π/2·v.
    """
    snr = np.exp(levels)
    s2 = 1.0 / (1.0 + snr)
    return {
        "noise": snr,  # s·δeps = -a·δx0
        "clean": np.ones_like(snr),
        "v": 1.0 / s2,
        "velocity": (np.pi / 2) ** 2 / s2,
        "score": snr / s2,  # eps over s
        "f": snr + 4.0,  # EDM's λ(σ) = 1/σ² + 1/σ_data²
    }


@pytest.mark.parametrize("space", SPACES)
def test_the_best_denoiser_has_the_least_error(oracle, space):
    for bounds, estimate in zip(pairwise(EDGES), oracle.by_bin(space), strict=True):
        levels = np.linspace(*bounds, 2001)
        least = np.mean(VARIANCES / (1.0 + np.exp(levels)[:, None] * VARIANCES), axis=1)
        exact = np.mean(least * factors(levels)[space])
        assert abs(estimate.mean - exact) < 4 * estimate.standard_error
        assert estimate.standard_error < 0.1 * exact


# One that ends in noise of variance 1, and one whose noise grows, are in every run of the tests.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("cosine", "ve") else pytest.mark.thorough)
        for name in PATHS
        if name != "linear"
    ],
)
def test_on_any_path_the_same_images_have_the_same_errors(oracle, name):
    loss = measured(DATA.predict(PATHS[name]), PATHS[name])
    for space in SPACES:
        np.testing.assert_allclose(loss.errors[space], oracle.errors[space], rtol=5e-3)


@pytest.mark.parametrize(
    "target",
    [
        targets.Velocity(),
        pytest.param(targets.V(), marks=pytest.mark.thorough),
        pytest.param(targets.F(), marks=pytest.mark.thorough),
    ],
    ids=repr,
)
def test_what_a_network_predicts_does_not_matter(oracle, target):
    path = paths.Cosine()
    predict = DATA.predict(path)

    def apply(params, x, noise_label, cond, **options):
        t = paths.time_of_log_snr(path, noise_label)
        k = target(coeffs(path, t, 2))
        return targets.encode(k, predict(x, t, None))

    network = denoiser(apply, {}, path, Precond(target, LogSNRLabel(scale=1.0)))
    loss = measured(network, path, spaces={"clean": targets.Clean()})
    np.testing.assert_allclose(loss.errors["clean"], oracle.errors["clean"], rtol=5e-3)


def test_a_worse_model_is_worse_by_what_it_is_off(oracle):
    """An offset of x0 adds its square, in expectation; in the noise, times the SNR."""
    best = DATA.predict(paths.Linear())

    def off(x, t, cond):
        pair = best(x, t, cond)
        return Pair(pair.x0 + 0.3, pair.eps)

    loss = measured(off, paths.Linear())
    for space in ("clean", "noise"):
        more = loss.errors[space] - oracle.errors[space]
        error = more.std(axis=0, ddof=1) / np.sqrt(len(more))
        levels = np.linspace(EDGES[:-1], EDGES[1:], 2001)
        exact = np.mean(0.09 * factors(levels)[space], axis=0)
        np.testing.assert_array_less(np.abs(more.mean(axis=0) - exact), 4 * error)
        assert loss.total(space).mean > oracle.total(space).mean


def test_noise_depends_on_the_image_and_not_on_the_batch(oracle):
    loss = measured(DATA.predict(paths.Linear()), paths.Linear(), batch_size=300)
    np.testing.assert_allclose(loss.errors["v"], oracle.errors["v"], rtol=1e-5)


@pytest.mark.thorough(tenth=False)
def test_labels_reach_the_model():
    def knows(x, t, cond):
        return Pair(jnp.where(cond[:, None] > 0, 0.0, 100.0) + 0.0 * x, x)

    labels = np.arange(1000, dtype=np.int32) % 2
    loss = loss_by_log_snr(
        knows, paths.Linear(), IMAGES, labels, KEY,
        spaces={"clean": targets.Clean()}, edges=(-1.0, 1.0), batch_size=1000,
    )  # fmt: skip
    assert (loss.errors["clean"][::2] > 5000).all()
    assert (loss.errors["clean"][1::2] < 100).all()


def test_where_a_path_does_not_reach_nothing_is_asked_or_counted(oracle):
    """LinearLogSNR ends at -5, inside the first bin."""
    path = schedules.LinearLogSNR()
    loss = measured(DATA.predict(path), path)
    assert loss.covered.tolist() == [False, True, True]
    assert loss.by_bin("clean")[0] is None
    # The two bins left are 3 and 2 wide, and count so.
    _, wide, narrow = loss.errors["clean"].mean(axis=0)
    assert loss.total("clean").mean == pytest.approx((3 * wide + 2 * narrow) / 5)
    assert oracle.total("clean", loss.covered).mean == pytest.approx(
        loss.total("clean").mean, rel=1e-3
    )
    table = validation.loss_table({"here": loss, "there": oracle}, "clean").splitlines()
    assert len({len(line) for line in table}) == 1
    assert "–" in table[1]
    assert "mean of -3 … 2" in table[-1]
    written = json.loads(json.dumps(validation.losses_as_json(loss)))
    assert written["spaces"]["clean"]["by_log_snr"][0] is None
    assert written["covered"] == [False, True, True]
    with pytest.raises(UserError, match="within the path's range"):
        measured(DATA.predict(path), path, edges=(-9.0, -7.0))


def test_a_model_that_diverged_is_named():
    with pytest.raises(UserError, match="not finite"):
        measured(lambda x, t, cond: Pair(x * jnp.nan, x), paths.Linear())


def run(*arguments):
    return cli.run(validate.main, validate.FLAGS, usage=validate.USAGE, argv=arguments)


@dataclass(frozen=True)
class UntrainedRun(Run):
    """A run as its first step would find it, but for what is not 0 there."""

    @property
    def step(self):
        return 0

    def weights(self, name=None):
        if name not in (None, self.config.weights, "live"):
            raise UserError(f"no weights are called {name!r}; did you mean 'live'?")
        shapes = jax.eval_shape(self.parts.wired.init, jax.random.key(0))
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


@pytest.fixture
def workdirs(tmp_path, monkeypatch):
    """Folders named after objectives, in each of which `load` finds an untrained run."""

    def load(workdir, weights, allowed_packages, step=None):
        assert step is None
        folder = Path(workdir)
        if not folder.is_dir():
            raise UserError(f"there is no run in {workdir}")
        config = config_files.load(f"{CONFIG}:objective={folder.name}")
        config.model = spec(Tiny)
        if folder.parent.name == "other_data":
            config.data.split_seed = 1
        wired = wire(config, (8, 8, 1), of_classes(10))
        programs = Programs(wired, make_mesh(devices=jax.devices()[:1]))
        parts: Any = SimpleNamespace(wired=wired, config=config, programs=programs)
        return UntrainedRun(parts, cast(Any, None), folder)

    monkeypatch.setattr(diffjax, "load", load)
    folders = [tmp_path / "flow", tmp_path / "vdm", tmp_path / "other_data" / "flow"]
    for folder in folders:
        folder.mkdir(parents=True)
    return [str(folder) for folder in folders]


def test_runs_with_other_objectives_in_one_table(workdirs, tmp_path, capsys):
    workdirs = workdirs[:2]
    out = tmp_path / "plot.png"
    flags = ["--space=noise,v", "--num_images=20", f"--plot={out}"]
    assert run(f"--workdirs={','.join(workdirs)}", *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if "error at log-SNR" in line]
    assert [head.split()[-2:] for head in heads] == [workdirs, workdirs]
    assert out.read_bytes().startswith(b"\x89PNG")
    found = [json.loads((Path(w) / "validation.json").read_text()) for w in workdirs]
    assert found[0]["test_sha256"] == found[1]["test_sha256"]
    assert (found[0]["num_images"], found[0]["weights"], found[0]["step"]) == (20, "ema-0.999", 0)
    assert (sum(found[0]["covered"]), sum(found[1]["covered"])) == (20, 15)
    # Networks begin by predicting 0; vdm's predicts the noise, whose variance is 1.
    assert found[1]["spaces"]["noise"]["total"]["mean"] == pytest.approx(1.0, rel=0.05)


def test_results_go_to_a_folder_or_of_several_runs_to_one_of_each_name(workdirs, tmp_path):
    runs = {name: diffjax.load(name, weights=None, allowed_packages=()) for name in workdirs}
    out = tmp_path / "out"
    with pytest.raises(UserError, match="two of the runs are called flow"):
        validate.in_folder(runs, out)
    two = {name: runs[name] for name in workdirs[:2]}
    assert [run.workdir for run in validate.in_folder(two, out).values()] == [
        out / "flow", out / "vdm",
    ]  # fmt: skip
    one = {name: runs[name] for name in workdirs[:1]}
    assert [run.workdir for run in validate.in_folder(one, out).values()] == [out]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--space=nois"], "did you mean 'noise'"),
        (["--space_path=cosin"], "did you mean 'cosine'"),
        (["--plot=x.jpg"], "should end in .png"),
        (["--num_images=1"], "num_images"),
        (["--weights=ema-0.9"], "no weights are called 'ema-0.9'"),
        (["--space="], "--space is empty"),
    ],
)
def test_mistakes_end_in_one_line(workdirs, arguments, message, capsys):
    assert run(f"--workdirs={workdirs[0]}", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_folders_that_will_not_do(workdirs, tmp_path, capsys):
    assert run() == 2
    assert "--workdirs is missing" in capsys.readouterr().err
    assert run(f"--workdirs={workdirs[0]},{workdirs[0]}") == 2
    assert "twice" in capsys.readouterr().err
    assert run(f"--workdirs={tmp_path}/nothing") == 2
    assert "there is no run in" in capsys.readouterr().err
    assert run(f"--workdirs={workdirs[0]},{workdirs[2]}") == 2
    assert "has other test images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "otcfm",
        pytest.param("interpolant", marks=pytest.mark.thorough),
        pytest.param("reflow", marks=pytest.mark.thorough),
    ],
)
def test_runs_whose_images_are_mixed_otherwise_are_refused(name, workdirs, capsys):
    folder = Path(workdirs[0]).parent / name
    folder.mkdir()
    assert run(f"--workdirs={workdirs[0]},{folder}") == 2
    assert "mixed with independent noise" in capsys.readouterr().err
