"""What a dry run reports about a folder of pictures; it refuses what training would refuse."""

from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import image_folder as image_folder_config
from diffjax import config_files
from diffjax.conditions import Classes
from diffjax.data import ArraySource, Coarse, DataSet, translation
from diffjax.data.image_folders.folder import image_folder
from diffjax.errors import UserError
from diffjax.performance.planning.compiled import expected_data
from diffjax.runs import workdirs
from diffjax.runs.setup import Setup, set_up
from diffjax.spec import build, spec
from experiments import train
from experiments.flags import cli
from tests.support.tiny_network import Tiny


def folder_of(path: Path, sizes) -> Path:
    path.mkdir()
    for i, size in enumerate(sizes):
        Image.new("RGB", size).save(path / f"{i:03}.png")
    return path


def notes(path: Path, image_size: int) -> tuple[str, ...]:
    return image_folder(str(path), image_size=image_size).notes


def test_pictures_as_large_as_asked_need_no_note(tmp_path):
    folder = folder_of(tmp_path / "a", [(32, 40)] * 9 + [(70, 33)])
    assert notes(folder, 32) == ()
    assert notes(folder, 16) == ()


def test_enlarged_pictures_are_counted_by_their_shorter_side_and_a_size_is_named(tmp_path):
    folder = folder_of(tmp_path / "a", [(40, 30), (200, 28), (64, 64), (64, 90)])
    (said,) = notes(folder, 64)
    assert said == (
        f"2 of 4 images looked at in {folder} have a side below data.image_size=64, down to 28 "
        "pixels, and are enlarged: data.image_size=24 suits them"
    )
    assert notes(folder, 24) == ()


def test_one_small_picture_of_many_is_named_but_moves_no_size(tmp_path):
    folder = folder_of(tmp_path / "a", [(64, 64)] * 29 + [(10, 10)])
    (said,) = notes(folder, 64)
    assert "1 of 30 images" in said
    assert said.endswith("down to 10 pixels, and are enlarged")


def test_tiny_pictures_have_a_size_too(tmp_path):
    (said,) = notes(folder_of(tmp_path / "a", [(5, 6)] * 4), 64)
    assert said.endswith("data.image_size=5 suits them")


def test_what_is_no_picture_is_left_to_whoever_reads_it(tmp_path):
    folder = folder_of(tmp_path / "a", [(64, 64)] * 4)
    (folder / "broken.png").write_bytes(b"nothing")
    assert notes(folder, 64) == ()


def test_notes_stay_with_sets_made_of_others(tmp_path):
    data = image_folder(str(folder_of(tmp_path / "a", [(4, 4)] * 4)), image_size=8)
    assert translation(data, Coarse()).notes == data.notes != ()


def data_of(num_images: int) -> DataSet:
    images = np.zeros((num_images, 8, 8, 1), np.uint8)
    source = ArraySource(images, np.zeros(num_images, np.int32))
    return DataSet("some", source, source, (8, 8, 1), 0, ())


@pytest.mark.parametrize(
    ("num_images", "num_steps", "suiting"),
    [
        (270, 100_000, 8_500),  # 2,000·270/64 = 8,437.5
        (20, 100_000, 2_000),  # the fewest that train anything
        (20, 2_000, None),
        (50_000, 400_000, None),  # 512 times
        (1_600, 100_000, None),  # 4,000 times, as EDM
        (1_599, 100_000, 50_000),
    ],
)
def test_more_steps_than_few_pictures_are_worth_are_named(num_images, num_steps, suiting):
    config = ConfigDict({"num_steps": num_steps, "batch_size": 64})
    found = train.note_on_steps(config, data_of(num_images))
    assert len(found) == (suiting is not None)
    assert all(f"--config.num_steps={suiting} suits them" in note for note in found)
    if suiting:
        assert f"seen {num_steps * 64 / num_images:,.0f} times" in found[0]


@pytest.fixture
def folder(tmp_path) -> Path:
    return folder_of(tmp_path / "pictures", [(12, 9)] * 30)


def prepared(folder: Path) -> tuple[Setup, DataSet]:
    config = image_folder_config.get_config()
    config.data.update(path=str(folder), image_size=16)
    config.model = spec(Tiny)
    config.sampling.guidance_scale = 1.0
    data = image_folder(str(folder), image_size=16)
    return set_up(config, data.image_shape, data.condition), data


def test_a_dry_run_says_what_suits_the_folder(folder, tmp_path):
    said = train.describe(*prepared(folder), tmp_path / "run").splitlines()
    assert any("27 images of 16x16x3, no classes; 3 for testing; all were read" in x for x in said)
    assert any(
        line.startswith("  image_size") and "16: 9 of 10 have sides" in line for line in said
    )
    assert any(line.startswith("metrics") and line.endswith("features pixels:8x8") for line in said)
    sizes, steps = (line for line in said if line.startswith("note: "))
    assert "30 of 30 images" in sizes
    assert "data.image_size=8 suits them" in sizes
    assert "--config.num_steps=2000 suits them" in steps
    assert not (tmp_path / "run").exists()


def test_a_dry_run_reads_pictures_of_both_splits(folder, tmp_path):
    setup, data = prepared(folder)
    for source in (data.train, data.test):
        file = folder / source.files[-1]  # type: ignore[attr-defined]
        content = file.read_bytes()
        file.write_bytes(content[:40])
        with pytest.raises(UserError, match=rf"can't read image {file}"):
            train.describe(setup, data, tmp_path / "run")
        file.write_bytes(content)


def test_it_reads_256_of_many(tmp_path):
    assert train.read_some(data_of(1_000)) == 2 * 256
    assert train.read_some(data_of(100)) == 200


def test_a_dry_run_refuses_another_runs_folder_as_training_does(folder, tmp_path):
    setup, data = prepared(folder)
    workdir = tmp_path / "run"
    workdir.mkdir()
    workdirs.claim(workdir, setup.config)
    train.describe(setup, data, workdir)  # its own
    before = sorted(path.name for path in workdir.rglob("*"))
    setup.config.num_steps = 7
    for refuse in (
        lambda: train.describe(setup, data, workdir),
        lambda: workdirs.claim(workdir, setup.config),
    ):
        with pytest.raises(UserError, match=r"another config \(num_steps: 100000 there, 7 here\)"):
            refuse()
    (workdir / "config.json").unlink()
    with pytest.raises(UserError, match=r"its config\.json is missing"):
        train.describe(setup, data, workdir)
    before.remove("config.json")
    assert sorted(path.name for path in workdir.rglob("*")) == before


@pytest.mark.parametrize(
    ("steps", "says"), [("x", "the first and the last step"), ("2000:9999", "ends with step 2000")]
)
def test_a_dry_run_refuses_to_profile_steps_beyond_the_run(steps, says, capsys):
    argv = ["--config=configs/digits.py", "--dry_run", f"--profile_steps={steps}"]
    assert cli.run(train.main, train.FLAGS, usage=train.USAGE, argv=argv) == 2
    assert says in capsys.readouterr().err


def test_the_folders_transformer_has_the_name_that_others_have():
    models = image_folder_config.models()
    assert models["dit"] == models["DiT-S/2"]


def test_a_folder_decides_what_no_flag_sets(tmp_path):
    folder = folder_of(tmp_path / "pictures", [(30, 41)] * 30)
    given = {"config.data.path": str(folder)}
    config = config_files.load("configs/image_folder.py", given)
    assert (config.name, config.data.path) == ("image_folder-pictures", str(folder))
    assert config.data.image_size == 24
    assert config.num_steps == 2_000  # 2,000·27/64 are fewer
    assert config.sampling.guidance_scale == 1  # no classes
    assert config.evaluation.num_samples == 100
    model = config.model
    assert (model.channels, model.head_channels, len(model.channel_multipliers)) == (32, 32, 3)
    assert model.attention_resolutions == (12, 6)
    given |= {"config.data.image_size": "64", "config.data.buckets": "8"}
    config = config_files.load("configs/image_folder.py", given)
    assert (config.data.image_size, config.model.attention_resolutions) == (64, ())
    given["config.data.image_size"] = "64.5"  # refused when the flag is parsed
    assert config_files.load("configs/image_folder.py", given).data.image_size == 24


def test_a_table_of_classes_decides_that_there_is_guidance(tmp_path):
    folder = folder_of(tmp_path / "pictures", [(9, 9)] * 4)
    lines = [f"{i:03}.png,{i % 2}" for i in range(4)]
    (folder / "list.csv").write_text("\n".join(["file_name,kind", *lines]))
    config = image_folder_config.get_config(
        data_path=str(folder), data_labels="list.csv", data_label_column="kind"
    )
    assert config.sampling.guidance_scale == 2
    assert build(config.data).label_names == ("0", "1")
    assert image_folder_config.get_config(data_path=str(folder)).sampling.guidance_scale == 1


def test_without_a_folder_the_config_is_for_64_pixels():
    config = image_folder_config.get_config()
    assert (config.data.image_size, config.num_steps, config.model.channels) == (64, 100_000, 64)
    assert config.model.attention_resolutions == (16,)
    for size, levels in ((8, 2), (16, 2), (24, 3), (32, 3), (40, 3), (64, 3), (128, 4), (5, 1)):
        model = image_folder_config.unet(size, 10**4, buckets=False)
        assert len(model.channel_multipliers) == levels, size
        assert size % 2 ** (levels - 1) == 0


def test_a_plan_of_a_folder_looks_at_the_folder(tmp_path):
    config = image_folder_config.get_config()
    for name in ("cat", "dog"):
        folder_of(tmp_path / name, [(12, 9)] * 5)
    config.data.update(path=str(tmp_path), image_size=16)
    assert expected_data(config) == ((16, 16, 3), Classes(2, ("cat", "dog")))
    config.data.path = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"no folder {tmp_path / 'nowhere'}"):
        expected_data(config)
