"""A published pipeline that is tuned on captioned pictures, from one command to a folder again."""

import json
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import diffjax
from configs.finetune import get_config
from diffjax import config_files
from diffjax.conditions.numbers import Numbers
from diffjax.data import batches
from diffjax.data.image_folders.buckets import BucketedSource, bucket_of, bucket_sizes
from diffjax.data.image_folders.folder import read_image
from diffjax.data.pipeline import rows_of_bucket
from diffjax.data.sources import ArraySource, Bucket, DataSet
from diffjax.errors import UserError
from diffjax.exchange.convert import convert
from diffjax.host.run_files import read_json
from diffjax.loop import device_batches, loop
from diffjax.runs import setup
from diffjax.spec import build
from diffjax.tuning import captioned
from diffjax.tuning.prior import Prior, PriorSource
from experiments import train
from experiments.flags import cli
from tests.support.tiny_pipeline import SIDE, write_pictures, write_pipeline
from tests.support.tiny_run import one_device

PROMPTS = ("red", "blue bird")


def resolved(folder: Any, **texts: Any) -> Any:
    """The config of the command with these flags."""
    given = {f"config.{name}": str(text) for name, text in texts.items()}
    given["config.init_from"] = str(folder / "pipe")
    config = config_files.load("configs/finetune.py", given)
    return config_files.lock(config, config_files.override(config, given))


def last_line(capsys: Any, *argv: str) -> str:
    command = ["--config=configs/finetune.py", *argv]
    assert cli.run(train.main, train.FLAGS, usage="", argv=command) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_pipeline_comes_first(tmp_path, capsys):
    """What a user forgets or mistypes, in one line, before a weight is read."""
    assert "this config begins with a published pipeline: --config.init_from" in last_line(capsys)
    flag = f"--config.init_from={tmp_path}"
    assert "is no pipeline: a folder with model_index.json" in last_line(capsys, flag)
    parts = {"unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(parts))
    assert "has no text encoder, which captions need" in last_line(capsys, flag)
    parts["text_encoder"] = ["transformers", "CLIPTextModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(parts))
    assert "is half a pipeline: the folder vae is missing" in last_line(capsys, flag)


def test_data_without_a_pipeline_are_refused():
    with pytest.raises(UserError, match="this config tunes a pipeline"):
        captioned.captioned_latents("pictures")


def test_the_numbers_of_a_crop_are_those_of_sdxl():
    """A picture of 600 x 400 for 200: resized to 300 x 200, of which 50 rows are cut above."""
    names = ("original_height", "original_width", "crop_top", "crop_left", "height", "width")
    kind = Numbers((*names, "aesthetic_score"), (0.0,) * 6 + (6.0,))
    found = captioned._numbers(kind, (600, 400), (200, 200))
    assert found == [600, 400, 50, 0, 200, 200, 6]


def test_pictures_of_the_class_are_drawn_as_often_as_their_weight_says():
    """By w/(1 + w) of all draws, each of them equally often; the rest are the rows themselves."""

    def of(values: Any) -> ArraySource:
        images = np.asarray(values, np.uint8).reshape(-1, 1, 1, 1)
        return ArraySource(images, np.zeros(len(images), np.int32))

    source = PriorSource(of([1, 2]), of([10, 11, 12]), weight=3.0)
    grid = (np.arange(1200) + 0.5) / 1200
    rows = np.arange(1200) % 2
    found = source.draw(rows, grid)["image"].ravel()
    assert [(found == value).mean() for value in (10, 11, 12)] == [0.25, 0.25, 0.25]
    np.testing.assert_array_equal(found[found < 10], rows[found < 10] + 1)
    assert source.gather([1])["image"].ravel() == [2]
    assert source.fingerprint() != replace(source, weight=1.0).fingerprint()
    with pytest.raises(UserError, match="there are no pictures of the class"):
        PriorSource(of([1]), of([]), 1.0)


def trained(place: Any, workdir: Any, **flags: Any) -> None:
    config = resolved(
        place,
        **{
            **{"data.path": place / "pictures", "data.cache": place / "cache"},
            **{"num_steps": 2, "batch_size": 2, "sample_prompts": ",".join(PROMPTS)},
            **{"sampling.num_steps": 2, "evaluation.num_samples": 4},
            **flags,
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda **_: one_device())
        loop.train(config, workdir)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pipeline, pictures, and a run of two steps that tuned the one on the other."""
    pytest.importorskip("tokenizers", reason="pip install -e '.[text]'")
    place = tmp_path_factory.mktemp("tuning")
    write_pipeline(place / "pipe")
    write_pictures(place / "pictures")
    trained(place, place / "run", **{"optimizer.learning_rate": 0.01})
    return place


def test_pictures_and_captions_are_encoded_once(tmp_path, monkeypatch):
    """By the folder's autoencoder and text encoder; the second time they are read."""
    pytest.importorskip("tokenizers", reason="pip install -e '.[text]'")
    monkeypatch.setattr(captioned, "make_mesh", lambda **_: one_device(), raising=False)
    write_pipeline(tmp_path / "pipe")
    write_pictures(tmp_path / "pictures")
    flags = {"data.path": tmp_path / "pictures", "data.cache": tmp_path / "cache"}
    config = resolved(tmp_path, **flags)
    first = build(config.data, DataSet).train.gather([0, 1, 2, 3])
    monkeypatch.setattr(captioned, "encode", lambda *args, **how: pytest.fail("encoded again"))
    again = build(config.data, DataSet).train.gather([0, 1, 2, 3])
    assert first["image"].shape == (4, SIDE // 2, SIDE // 2, 4)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    # Captions in turn are red, blue, green, red.
    states = np.asarray(first["text_states"], np.float32)
    np.testing.assert_array_equal(states[0], states[3])
    assert np.abs(states[0] - states[1]).max() > 1e-3


pipelines = pytest.mark.thorough(tenth=False)


@pipelines
def test_the_run_begins_as_the_pipeline_and_ends_as_a_pipeline(place, tmp_path):
    run, before = diffjax.load(place / "run"), diffjax.from_pretrained(place / "pipe")
    found = run.sample(list(PROMPTS), seed=3)
    lines = convert(str(place / "run"), "diffusers", tmp_path / "out")
    assert "scheduler: copied" in lines
    after = diffjax.from_pretrained(tmp_path / "out")
    how: dict[str, Any] = {"seed": 3, "num_steps": 2}
    np.testing.assert_array_equal(found, after.sample(list(PROMPTS), **how))
    assert np.abs(found - before.sample(list(PROMPTS), **how)).max() > 0.01
    with Image.open(place / "run/samples/step_00000000.png") as image:
        drawn = np.asarray(image)[16:]  # Below the prompts.
    first = before.sample([*PROMPTS] * 2, seed=0, num_steps=2)[0]
    pixels = np.rint((first + 1) * 127.5).repeat(3, 0).repeat(3, 1)
    assert np.abs(drawn[:48, :48] - pixels).max() <= 1


@pipelines
def test_its_page_shows_prompts_and_pictures_before_and_after(place):
    page = (place / "run/report.html").read_text()
    assert all(f"<li>{prompt}</li>" in page for prompt in PROMPTS)
    assert "that of step 0 is by the weights that the run began with" in page
    assert "samples at step 0" in page
    assert "samples at step 2" in page
    assert (read_json(place / "run/evaluation.json") or {})["num_samples"] == 4


@pipelines
def test_what_was_encoded_is_found_again_and_never_for_other_captions(place, monkeypatch, tmp_path):
    def encoded(path: Any) -> Any:
        flags = {"data.path": path, "data.cache": place / "cache"}
        return build(resolved(place, **flags).data, DataSet).train

    made = []
    monkeypatch.setattr(captioned, "encode", lambda *args, **how: made.append(args))
    before = encoded(place / "pictures")
    batch: Any = before.gather([0, 1])
    assert not made
    assert batch["image"].shape == (2, SIDE // 2, SIDE // 2, 4)
    states = before.cached.condition.parse(list(before.captions[:2])).states
    np.testing.assert_allclose(batch["text_states"], states, atol=2e-3)  # float16
    other = shutil.copytree(place / "pictures", tmp_path / "pictures")
    (other / "0.txt").write_text("green")
    after = encoded(other)
    assert after.fingerprint() != before.fingerprint()
    with pytest.raises((UserError, FileNotFoundError)):  # There is nothing that `encode` wrote.
        after.gather([0])
    assert len(made) == 1


@pipelines
def test_pictures_of_the_class_are_drawn_by_the_pipeline_once(place, tmp_path):
    prior = Prior("red", num_images=3, pipeline=str(place / "pipe"))
    drawn = prior.pictures(SIDE, tmp_path)
    assert drawn.train.captions == ("red",) * 3
    times = [file.stat().st_mtime_ns for file in sorted(tmp_path.glob("*/*.png"))]
    assert prior.pictures(SIDE, tmp_path).train.fingerprint() == drawn.train.fingerprint()
    assert times == [file.stat().st_mtime_ns for file in sorted(tmp_path.glob("*/*.png"))]
    given = replace(prior, path=str(place / "pictures"))
    assert set(given.pictures(SIDE, tmp_path).train.captions) == {"red", "blue", "green"}


@pipelines
@pytest.mark.parametrize(
    ("arguments", "path", "target"),
    [
        ("target=v", "ScaledLinearBetas", "V"),
        ("objective=flow", "Linear", "Velocity"),
        ("path=cosine", "Cosine", "Noise"),
    ],
)
def test_axes_that_are_chosen_take_the_place_of_the_folders(place, arguments, path, target):
    config = get_config(arguments, init_from=str(place / "pipe"))
    assert config.path["_target_"].endswith(f":{path}")
    assert config.precond.target["_target_"].endswith(f":{target}")
    assert config.name == f"finetune-pipe-{arguments.partition('=')[2]}"


@pipelines
def test_lora_is_trained_alone_and_leaves_as_a_file_for_the_pipeline(place, tmp_path):
    flags = {"lora.rank": 2, "optimizer.learning_rate": 0.05, "optimizer.warmup_steps": 0}
    trained(place, tmp_path / "run", **flags)
    run = diffjax.load(tmp_path / "run")
    assert run.state.params.keys() != run.state.frozen.keys()
    convert(str(tmp_path / "run"), "lora", tmp_path / "lora")
    (file,) = (tmp_path / "lora").glob("*.safetensors")
    tuned = diffjax.from_pretrained(place / "pipe", loras={str(file): 1.0})
    how: dict[str, Any] = {"seed": 3, "num_steps": 2}
    found = tuned.sample(list(PROMPTS), **how)
    np.testing.assert_allclose(run.sample(list(PROMPTS), seed=3), found, atol=1e-4)
    before = diffjax.from_pretrained(place / "pipe").sample(list(PROMPTS), **how)
    assert np.abs(found - before).max() > 0.01


class TestBuckets:
    def test_sizes_are_multiples_of_at_most_the_area_and_symmetric(self):
        sizes = bucket_sizes(1024, 64)
        assert {(1024, 1024), (832, 1216), (1216, 832), (512, 2048), (704, 1408)} <= set(sizes)
        assert all(h * w <= 1024**2 and h % 64 == w % 64 == 0 for h, w in sizes)
        assert {(w, h) for h, w in sizes} == set(sizes)
        assert all(bucket_of(size, sizes) == i for i, size in enumerate(sizes))
        with pytest.raises(UserError, match="and does not divide data"):
            bucket_sizes(500, 64)

    def test_a_picture_is_cropped_to_its_bucket(self, tmp_path):
        """600 x 200 for 64 x 32: 400 rows of the middle, of 100 to 500, are averaged."""
        pixels = np.zeros((600, 200, 3), np.uint8)
        pixels[100:500] = 200
        Image.fromarray(pixels).save(tmp_path / "a.png")
        found = read_image(tmp_path / "a.png", "a", (64, 32))
        assert found.shape == (64, 32, 3)
        assert found.min() == 200

    @pytest.mark.parametrize("parts", [1, 2])
    def test_each_batch_is_of_one_bucket_and_an_epoch_has_all(self, parts):
        """Of 5 and 3 rows in batches of 2 an epoch has 5 batches, and 2 rows again."""
        buckets = [Bucket(range(5), (2, 4, 1)), Bucket(range(5, 8), (4, 2, 1))]
        epochs = [
            [rows_of_bucket(buckets, 5 * epoch + i, 2, seed=0) for i in range(5)]
            for epoch in range(2)
        ]
        for epoch in epochs:
            assert all((rows < 5).all() or (rows >= 5).all() for rows in epoch)
            assert set(np.concatenate(epoch).tolist()) == set(range(8))
        assert not np.array_equal(*epochs)

        def of(rows: range, shape: Any) -> ArraySource:
            images = np.zeros((len(rows), *shape), np.uint8) + np.reshape(rows, (-1, 1, 1, 1))
            return ArraySource(images.astype(np.uint8), np.array(rows, np.int32))

        shapes = tuple(bucket.image_shape for bucket in buckets)
        source = BucketedSource(tuple(map(of, *zip(*buckets, strict=True))), shapes)
        assert list(source.buckets) == buckets
        streams = [batches(source, batch_size=2, seed=0, part=(p, parts)) for p in range(parts)]
        for step in range(5):
            each = [next(stream) for stream in streams]
            found = np.concatenate([batch["label"] for batch in each])
            np.testing.assert_array_equal(found, epochs[0][step])
        with pytest.raises(UserError, match="these rows are of several"):
            source.gather([0, 7])


@pipelines
def test_pictures_of_unlike_shapes_are_trained_in_buckets(place, tmp_path, monkeypatch):
    """A program for each shape, and latents of these shapes, of the subject and of its class."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, size in enumerate([(32, 32), (60, 20), (20, 60), (64, 60)]):
        Image.new("RGB", size, (60 * i, 0, 0)).save(folder / f"{i}.png")
    flags = {"data.path": folder, "data.caption": "red", "data.buckets": 4, "num_steps": 3}
    flags |= {"data.prior.path": place / "pictures"}
    seen = []
    whole = device_batches.batches

    def watched(*args: Any, **how: Any) -> Any:
        for batch in whole(*args, **how):
            seen.append(batch["image"].shape)
            yield batch

    monkeypatch.setattr(device_batches, "batches", watched)
    trained(place, tmp_path / "run", **flags)
    assert {(2, 8, 8, 4), (2, 4, 12, 4), (2, 12, 4, 4)} == set(seen[:3])
    source: Any = build(resolved(place, **flags, **{"data.cache": tmp_path}).data, DataSet).train
    for part, shape in zip(source.sources, source.image_shapes, strict=True):
        assert len(part.prior) == 4
        of_class = part.prior.gather([1, 1])["image"]
        assert of_class.shape == (2, *shape)
