"""Seamless samples of a run, and a cascade of two runs through the command line."""

import jax
import numpy as np
import pytest

from diffjax import choices
from diffjax.data import digits, downscaled, upscaling
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.loop import loop
from diffjax.runs.samples.cascade import Cascade, Stage
from diffjax.runs.samples.model import Request
from diffjax.spec import spec
from experiments import cascade, sample
from experiments.flags import cli
from tests.support.tiny_run import loaded, on_one_device, tiny_config, without_pictures


def test_seamless_samples_of_a_network_of_single_pixels_are_the_same(loaded_run):
    """It commutes with any roll, so rolls by random distances and back change nothing."""
    plain = loaded_run.sample([3, 4], guidance_scale=1.0)
    np.testing.assert_allclose(
        loaded_run.sample([3, 4], guidance_scale=1.0, seamless="x"), plain, atol=1e-5
    )
    with pytest.raises(UserError, match="no direction of seamless= is called 'z'"):
        loaded_run.sample(1, seamless="z")


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A base model of 4x4 pixels, and one that enlarges."""
    folder = tmp_path_factory.mktemp("cascade")
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        without_pictures(patch)
        for name, make, size in (("base", downscaled, 4), ("up", upscaling, 8)):
            config = tiny_config(num_steps=2).unlock()
            config.data = spec(make, dataset=spec(digits), factor=2)
            config.evaluation.extractor = spec(pixel_features, size=size)
            config.sampling.solver = choices.copy(choices.SOLVERS["euler"])
            loop.train(config.lock(), folder / name)
    return folder


@pytest.mark.thorough
def test_each_stage_is_conditioned_on_the_images_before(two_runs):
    base, up = (loaded(two_runs / name) for name in ("base", "up"))
    stages = [Stage(base.model(), base.recipe), Stage(up.model(), up.recipe, level=0.3)]
    request = Request(np.array([3, 4, 5]), seed=7)
    small, large = Cascade(stages).sample(request)
    assert (small.shape, large.shape) == ((3, 4, 4, 1), (3, 8, 8, 1))
    few = Cascade(stages).sample(request.only(np.array([2])))
    np.testing.assert_allclose(few[1], large[2:], atol=1e-4)
    by_hand = {"label": request.condition, "small": np.clip(small, -1, 1)}
    stages[1] = Stage(up.model(), up.recipe)
    without_noise = Cascade(stages).sample(request)[1]
    assert np.abs(without_noise - large).max() > 1e-3
    seen = up.parts.wired.condition.of(by_hand)
    np.testing.assert_array_equal(jax.tree.leaves(seen)[2], 0)


@pytest.mark.thorough
def test_the_command_line_chains_runs_and_compares_them(two_runs, tmp_path, capsys, monkeypatch):
    on_one_device(monkeypatch)
    out = tmp_path / "all.png"
    base, up = two_runs / "base", two_runs / "up"

    def run(script, *flags):
        return cli.run(script.main, script.FLAGS, usage=script.USAGE, argv=list(flags))

    then = f"--then={up},level=0.2,num_steps=2,guidance_scale=1"
    assert run(sample, f"--workdir={base}", then, "--num_samples=4", f"--out={out}") == 0
    with np.load(out.with_suffix(".npz")) as file:
        assert file["images"].shape == (4, 8, 8, 1)
    seamless = "--seamless=both", "--num_samples=2", f"--out={out}"
    assert run(sample, f"--workdir={base}", *seamless) == 0
    assert "seamless=both, jump=" in capsys.readouterr().out
    compared = f"--base={base}", then, f"--single={up}", "--num_samples=20"
    assert run(cascade, *compared) == 2
    assert "makes images of labels alone" in capsys.readouterr().err
    assert run(cascade, *compared[:2], "--num_samples=20") == 0
    assert "cascade" in capsys.readouterr().out
    for wrong, message in (
        (f"--then={up},levle=0.2", "no setting 'levle' of a run; did you mean 'level'"),
        (f"--then={up},level=high", "level=high needs a number"),
        (f"--then={up},level=0.9", "trained with noise of levels from 0 to 0.5"),
        (f"--then={base}", "enlarges no images"),
        ("--level=0.1", "no noise is added to"),
    ):
        assert run(sample, f"--workdir={base}", wrong, "--num_samples=2") == 2
        assert message in capsys.readouterr().err
    picture = tmp_path / "small.png"
    from PIL import Image

    Image.fromarray(np.zeros((4, 4), np.uint8)).save(picture)
    own = f"--labels=label=3;small={picture}", "--level=0.1", "--num_samples=2", f"--out={out}"
    assert run(sample, f"--workdir={up}", *own) == 0
