"""A new kind of condition touches its own file and its network: this file, and nothing else.

Directions, as angles in degrees: an image of one pixel and two channels shows the unit vector.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffjax import choices
from diffjax.conditions import Condition
from diffjax.data import ArraySource, DataSet, GivenSource
from diffjax.data.pairs import Coarse, pairs, translation
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.loop import loop
from diffjax.runs.measuring.measure import Wanted, measure
from diffjax.spec import spec
from experiments import (
    edit,
    evaluate,
    export,
    find_grid,
    likelihood,
    probe,
    reflow,
    sample,
    validate,
)
from experiments.flags import cli
from tests.support.shared_parts import shared_parts
from tests.support.tiny_run import assert_same, loaded, on_one_device, tiny_config, without_pictures


@dataclass(frozen=True)
class Directions(Condition):
    """Unit vectors, float32 `[n, 2]`; the null condition is the zero vector."""

    def network_arguments(self):
        return {}

    def shapes(self, n):
        return {"direction": jax.ShapeDtypeStruct((n, 2), jnp.float32)}

    def of_batch(self, batch):
        return batch["direction"]

    def null(self, n):
        return self.example(n)

    def parse(self, given):
        try:
            angles = np.radians([float(text) for text in given])
        except ValueError as error:
            raise UserError(f"an angle in degrees is a number: {error}") from None
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    def in_turn(self, n, most=None):
        return self.parse(90.0 * (np.arange(n) % min(4, most or 4)))

    def titles(self, cond):
        return [f"{np.degrees(np.arctan2(y, x)) % 360:.0f}°" for x, y in np.asarray(cond)]

    def describe(self):
        return "directions"


class Steered(nn.Module):
    """Adds a linear map of the direction to one of the pixel; it has no argument `num_classes`."""

    @nn.compact
    def __call__(self, x, noise_label, cond: Any = None, train: bool = False):
        h = nn.Dense(16)(x) + 1e-3 * noise_label[:, None, None, None]
        h = nn.silu(h + nn.Dense(16)(cond)[:, None, None])
        return nn.Dense(x.shape[-1])(h)


def directions(num_images: int = 256) -> DataSet:
    """Pictures `[1, 1, 2]` of 0.8 times the unit vectors of random angles."""
    kind = Directions()
    vectors = kind.parse(np.random.default_rng(0).uniform(0, 360, num_images))
    images = np.rint((0.8 * vectors + 1) * 127.5).astype(np.uint8)[:, None, None]

    def source(rows: slice) -> GivenSource:
        own = ArraySource(images[rows], np.zeros(len(images[rows]), np.int32))
        return GivenSource(own, {"direction": vectors[rows]})

    last = num_images // 4
    return DataSet(
        "directions", source(slice(last, None)), source(slice(last)), (1, 1, 2), 0, (), given=kind
    )


def config_of(**changes):
    config = tiny_config("objective=flow").unlock()
    config.data, config.model = spec(directions), spec(Steered)
    config.num_steps, config.batch_size, config.sample_images = 4, 16, 8
    config.sampling.solver = choices.copy(choices.SOLVERS["euler"])
    config.evaluation.extractor = spec(pixel_features, size=1)
    config.evaluation.solvers, config.evaluation.num_steps = (), ()
    config.update_from_flattened_dict(changes)
    return config.lock()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("directions") / "run"
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        shared_parts(patch)
        loop.train(config_of(), folder)
    return folder


def test_it_is_trained_shown_evaluated_and_reported(workdir):
    assert list((workdir / "samples").glob("step_*.png"))
    assert "directions" in repr(loaded(workdir))
    assert (workdir / "report.html").is_file()
    found = json.loads((workdir / "evaluation.json").read_text())
    assert (found["num_samples"], found["accuracy"]) == (20, None)
    with pytest.raises(UserError, match="samples of this run have the conditions of test images"):
        measure(loaded(workdir), directions(), Wanted(num_samples=12, labels="balanced"))


def test_conditions_of_test_images_need_some():
    with pytest.raises(UserError, match="conditions of test images, and directions has 2: its"):
        loop.prepared(config_of(**{"data.num_images": 8}))


def test_it_is_sampled_by_number_texts_arrays_and_away_from_others(workdir):
    run, how = loaded(workdir), {"num_steps": 2, "guidance_scale": 2.0}
    listed = run.sample(5, **how)
    np.testing.assert_array_equal(run.sample(["0", 90, "180", 270, 0], **how), listed)
    vectors = np.array([[1, 0], [0, 1]])
    np.testing.assert_allclose(run.sample(vectors, **how), listed[:2], atol=1e-6)
    away = run.sample([0, 90], against="label:45", **how)
    np.testing.assert_allclose(run.sample([0, 90], against=[45, 45.0], **how), away, atol=1e-6)
    assert np.abs(away - listed[:2]).max() > 1e-6
    for given, said in (
        (["north"], "an angle in degrees is a number"),
        (np.zeros((2, 3)), r"conditioned on directions: 2 samples need .* \(2, 2\), not \(2, 3\)"),
        (np.arange(3), r"shape \(3, 2\), not \(3,\)"),
    ):
        with pytest.raises(UserError, match=said):
            run.sample(given)


@pytest.mark.thorough(tenth=False)
def test_it_is_sampled_from_the_command_line(workdir, tmp_path, capsys):
    out = tmp_path / "a.png"
    argv = [f"--workdir={workdir}", f"--out={out}", "--allowed_packages=tests", "--num_samples=4"]
    assert cli.run(sample.main, sample.FLAGS, usage="", argv=[*argv, "--labels=0,45"]) == 0
    with np.load(tmp_path / "a.npz") as saved:
        np.testing.assert_allclose(saved["direction"], Directions().parse([0, 45, 0, 45]))
        images = saved["images"]
    np.testing.assert_array_equal(loaded(workdir).sample([0, 45, 0, 45]), images)
    again = [*argv[:1], f"--out={tmp_path / 'b.png'}", *argv[2:], f"--labels=@{tmp_path / 'a.npz'}"]
    assert cli.run(sample.main, sample.FLAGS, usage="", argv=again) == 0
    with np.load(tmp_path / "b.npz") as saved:
        np.testing.assert_array_equal(saved["images"], images)
    assert cli.run(sample.main, sample.FLAGS, usage="", argv=[*argv, "--labels=north"]) == 2
    assert "an angle in degrees is a number" in capsys.readouterr().err


def test_it_is_resumed_bit_for_bit(workdir, tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    shared_parts(monkeypatch)
    without_pictures(monkeypatch)
    folder = Path(shutil.copytree(workdir, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints" / "4")
    loop.train(config_of(), folder)
    assert_same(loaded(folder).state, loaded(workdir).state, atol=0, rtol=0)


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize(
    ("tool", "argv"),
    [
        (evaluate, ["--num_samples=12", "--solvers=ddim", "--num_steps=2", "--against=label:45"]),
        (evaluate, ["--num_samples=12", "--solvers=", "--num_steps=", "--guidance_scale=1,2"]),
        (find_grid, ["--num_samples=4", "--num_steps=2", "--num_candidates=8"]),
        (likelihood, ["--num_images=4", "--batch_size=4"]),
        (probe, []),
        (validate, ["--num_images=16"]),
        (edit, ["--task=vary", "--num_images=3", "--num_steps=2"]),
        (export, ["--num_steps=2", "--guidance_scale=2", "--out={out}/sampler.bin"]),
        (sample, ["--num_samples=3", "--film={out}/film.png", "--out={out}/filmed.png"]),
        (sample, ["--num_samples=3", "--solver=ddim", "--parallel=4", "--out={out}/parallel.png"]),
    ],
)
def test_every_executable_takes_it(workdir, tmp_path, capsys, tool, argv):
    folder = Path(shutil.copytree(workdir, tmp_path / "run"))
    given = [each.format(out=tmp_path) for each in argv]
    given += [f"--{'workdirs' if tool is validate else 'workdir'}={folder}"]
    given += ["--allowed_packages=tests"]
    assert cli.run(tool.main, tool.FLAGS, usage="", argv=given) == 0, capsys.readouterr().err


def test_pairs_of_reflow_keep_their_directions(workdir, tmp_path):
    out = tmp_path / "pairs.npz"
    argv = [f"--workdir={workdir}", f"--out={out}", "--num_pairs=20", "--allowed_packages=tests"]
    argv += ["--num_steps=2", "--guidance_scale=1"]
    assert cli.run(reflow.main, reflow.FLAGS, usage="", argv=argv) == 0
    again = pairs(directions(), str(out))
    assert again.condition == Directions()
    batch = again.train.gather([0, 3])
    with np.load(out) as saved:
        np.testing.assert_array_equal(again.condition.of_batch(batch), saved["direction"][[0, 3]])
        without = {name: saved[name] for name in saved if name != "direction"}
    assert set(batch) == {"image", "source", "label", "direction"}
    assert "direction" in translation(directions(), Coarse(1)).test.gather([0])
    assert translation(directions(), Coarse(1)).condition == Directions()
    np.savez(out, **without)
    with pytest.raises(UserError, match="lacks direction, and directions is conditioned on"):
        pairs(directions(), str(out))
