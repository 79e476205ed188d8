"""Fields of two channels, from the first step to the page and to samples."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import digits
from diffjax import choices
from diffjax.data import latents
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.loop import loop
from diffjax.spec import spec
from experiments import sample
from experiments.flags import cli
from tests.support.tiny_network import Tiny


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A finished run on 60 fields of 8×6 with two channels and three classes."""
    folder = tmp_path_factory.mktemp("fields")
    fields = np.random.default_rng(0).standard_normal((60, 8, 6, 2)).astype(np.float32)
    np.savez(folder / "fields.npz", latents=fields, labels=np.arange(60) % 3)
    config = digits.get_config()
    config.data = spec(
        latents, path=str(folder / "fields.npz"), num_classes=3, test_fraction=0.2, name="fields"
    )
    config.num_steps, config.batch_size = 2, 8
    config.model = spec(Tiny)
    config.optimizer.warmup_steps = 1
    config.sampling.solver = choices.copy(choices.SOLVERS["euler"])
    config.sampling.update(num_steps=2, guidance_scale=1.0)
    config.evaluation.extractor = spec(pixel_features, size=2)
    config.evaluation.update(num_samples=20, batch_size=20, solvers=(), num_steps=())
    loop.train(config, folder / "run")
    return folder / "run"


@pytest.mark.thorough
def test_a_run_of_two_channels_ends_with_its_page_and_pictures(workdir):
    assert "Fréchet distance" in (workdir / "report.html").read_text(encoding="utf-8")
    # 9 columns of 3 classes and 7 rows, below their names; both channels side by side.
    with Image.open(workdir / "samples/step_00000002.png") as picture:
        assert picture.size == (9 * (2 * 36 + 2) - 2, 16 + 7 * (48 + 2) - 2)
    assert (workdir / "samples/neighbours.png").exists()


def run_sample(workdir: Path, out: Path) -> int:
    argv = [f"--workdir={workdir}", "--num_samples=6", f"--out={out}", "--allowed_packages=tests"]
    return cli.run(sample.main, sample.FLAGS, usage=sample.USAGE, argv=argv)


@pytest.mark.thorough
def test_samples_of_two_channels_are_an_array_and_a_picture(workdir, tmp_path):
    out = tmp_path / "a.png"
    assert run_sample(workdir, out) == 0
    with np.load(out.with_suffix(".npz")) as arrays:
        assert arrays["images"].shape == (6, 8, 6, 2)
        assert arrays["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    with Image.open(out) as picture:
        assert picture.size == (3 * 74 - 2, 16 + 2 * 50 - 2)


@pytest.mark.thorough
def test_the_array_is_written_though_the_picture_can_not_be(workdir, tmp_path, monkeypatch, capsys):
    def refuse(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample, "save_png", refuse)
    assert run_sample(workdir, tmp_path / "a.png") == 2
    assert "No space left on device" in capsys.readouterr().err
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["images"].shape == (6, 8, 6, 2)
