"""A run on latents, from a folder to pictures: everything that is seen of it is decoded."""

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from jax import export
from PIL import Image

from diffjax.codecs import ScaledLatents, SpaceToDepth, Tiled
from diffjax.data import ArraySource, DataSet, all_images, digits, latents
from diffjax.data.pairs import Coarse, pairs, translation
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import classifier_features, pixel_features
from diffjax.evaluation.metrics import compare, reference
from diffjax.exchange.portable import portable_model, portable_sampler
from diffjax.loop import loop
from diffjax.runs.measuring.evaluated_samples import labels_in_mix
from diffjax.runs.measuring.measure import noise_seed
from diffjax.runs.samples.model import Request
from diffjax.runs.setup import set_up
from diffjax.sampling.export import serialise
from diffjax.spec import build, spec
from experiments import edit, reflow, sample
from experiments.flags import cli
from tests.support.tiny_run import loaded, of_noise, one_device, trained_config

CODEC = SpaceToDepth(2)
SCALE = 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Latents of 300 digits, written as in docs/data.md."""
    folder = tmp_path_factory.mktemp("latents")
    images, labels = all_images(digits().train)
    np.save(folder / "latents.npy", CODEC.encoder()(images[:300]))
    np.save(folder / "labels.npy", labels[:300])
    CODEC.record(folder)
    return folder


def of_pixels(data: Any) -> DataSet:
    """The images of a data set of latents, of the same rows."""
    plain: Any = digits()

    def images_of(source: Any) -> ArraySource:
        return ArraySource(plain.train.images[source.rows], plain.train.labels[source.rows])

    return replace(plain, train=images_of(data.train), test=images_of(data.test))


def config_of(folder, **changes):
    config = trained_config(num_steps=2, sample_every_steps=2, **changes)
    config.unlock()
    codec = spec(SpaceToDepth, block=2)
    config.data = spec(
        latents, path=str(folder), num_classes=10, test_fraction=0.1, scale=SCALE, codec=codec
    )
    config.sample_images = 4
    config.evaluation.num_samples = 12
    return config.lock()


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    loop.train(config_of(folder), workdir)
    return workdir


@pytest.fixture(scope="module")
def run(folder):
    """As `workdir`'s, but not trained."""
    config = config_of(folder)
    data = build(config.data)
    mesh = one_device()
    return of_noise(set_up(config, data.image_shape, data.condition, mesh, codec=data.codec))


def test_samples_are_decoded_latents(run):
    assert run.parts.codec == ScaledLatents(CODEC, SCALE)
    assert "images of 8x8x1 as latents of 4x4x4 (space_to_depth:2)" in repr(run)
    request = Request(np.arange(5), seed=3)
    found = run.model().sample_latents(run.recipe, request)
    squares = found.reshape(5, 4, 4, 2, 2, 1).transpose(0, 1, 3, 2, 4, 5) / SCALE
    images = run.sample(np.arange(5), seed=3)
    np.testing.assert_allclose(images, squares.reshape(5, 8, 8, 1), rtol=1e-5)
    (batch,) = run.model().batches(run.recipe, request)
    np.testing.assert_array_equal(batch, images)


@pytest.mark.parametrize(
    ("codec", "said"),
    [
        (Tiled(ScaledLatents(CODEC, SCALE), tile=2, overlap=0), None),
        (ScaledLatents(CODEC, 1.0), "its codec is 1 times space_to_depth:2 .*this run's is 0.5 ti"),
    ],
)
def test_a_run_is_guided_by_runs_on_latents_of_the_same_scale_alone(run, tmp_path, codec, said):
    (tmp_path / "config.json").write_text("{}")
    other = replace(run, parts=replace(run.parts, codec=codec))
    guided = replace(run, others=lambda folder, weights: other)
    if said is None:
        assert guided.called(str(tmp_path))[0] is other
        return
    with pytest.raises(UserError, match=said):
        guided.called(str(tmp_path))


@pytest.mark.thorough
def test_pictures_are_of_decoded_images(workdir):
    """Two columns of two digits of 8x8 pixels, each enlarged to 48, with 2 pixels between them."""
    picture = Image.open(workdir / "samples" / "step_00000002.png")
    assert (picture.mode, picture.size[0]) == ("L", 98)
    near = Image.open(workdir / "samples" / "neighbours.png")
    assert (near.mode, near.size[0]) == ("L", 6 * 50 - 2)


@pytest.mark.thorough
def test_the_evaluation_is_that_of_images_decoded_by_hand(workdir):
    found = json.loads((workdir / "evaluation.json").read_text())
    run = loaded(workdir)
    assert run.parts.codec == ScaledLatents(CODEC, SCALE)
    by_hand = of_pixels(run.dataset())
    labels = labels_in_mix(run, 12)
    images = run.sample(labels, seed=noise_seed(run.config.seed, 0))
    expected = compare(images, labels, reference(by_hand, classifier_features("digits")))
    for name in ("frechet_distance", "kernel_distance", "precision", "coverage"):
        assert found[name]["value"] == pytest.approx(expected[name]["value"], rel=1e-4)
        assert found[name]["floor"] == pytest.approx(expected[name]["floor"], rel=1e-4)
    for name in ("copied", "distance_ratio", "inauthentic"):
        assert found["neighbours"][name] == pytest.approx(expected["neighbours"][name], rel=1e-4)
    assert found["accuracy"] == expected["accuracy"]
    assert found["frechet_distance"]["provenance"]["codec_sha256"] == CODEC.sha256


def test_distances_of_latents_are_those_of_their_images(folder):
    """Of half of the training images from all of them, and of test images from them."""
    data: Any = latents(str(folder), num_classes=10, test_fraction=0.1, scale=SCALE, codec=CODEC)
    images, _ = all_images(digits().train)
    first, found = images[data.train.rows[::2]], []
    for part in (data, of_pixels(data)):
        real = reference(part, pixel_features(size=2))
        np.testing.assert_array_equal(
            real.train_images.take(np.arange(5)), images[data.train.rows[:5]]
        )
        found.append(compare(first, None, real, all_metrics=False))
    for name in ("frechet_distance", "kernel_distance"):
        for key in ("value", "floor"):
            assert found[0][name][key] == pytest.approx(found[1][name][key], rel=1e-6, abs=1e-9)
    stated = found[0]["frechet_distance"]["provenance"]
    assert (stated["codec"], stated["codec_sha256"]) == (CODEC.name, CODEC.sha256)
    assert (stated["value_range"], stated["rounding"]) == ("[-1,1]", "uint8")


def test_another_codec_than_the_one_that_encoded_is_refused(folder, tmp_path):
    recorded = f"{CODEC.name} ({CODEC.sha256[:12]}) encoded the latents in {folder}, not"
    with pytest.raises(UserError, match=re.escape(recorded)):
        latents(str(folder), num_classes=10, codec=SpaceToDepth(1))
    images, labels = all_images(digits().test)
    facts = {"name": "other", "sha256": "0" * 64}
    for stored, refused in ((json.dumps(facts), "other"), ("[]", "no JSON with name and sha256")):
        arrays = {"latents": CODEC.encoder()(images), "labels": labels, "codec": stored}
        np.savez(tmp_path / "all.npz", **arrays)
        with pytest.raises(UserError, match=refused):
            latents(str(tmp_path / "all.npz"), num_classes=10, codec=CODEC)


def test_what_is_not_known_of_latents_is_noted(folder, tmp_path):
    (note,) = latents(str(folder), num_classes=10).notes
    assert f"({CODEC.name} encoded them)" in note
    assert latents(str(folder), num_classes=10, codec=CODEC).notes == ()
    np.savez(tmp_path / "all.npz", latents=np.zeros((20, 4, 4, 4), np.float32))
    (note,) = latents(str(tmp_path / "all.npz"), num_classes=0, codec=CODEC).notes
    assert "nothing states what encoded" in note
    with pytest.raises(UserError, match="space_to_depth:3 has latents of 9 channels"):
        latents(str(tmp_path / "all.npz"), num_classes=0, codec=SpaceToDepth(3))


def test_latents_have_no_bits_per_dimension_and_no_translations(folder):
    config = config_of(folder)
    with config.unlocked():
        config.evaluation.likelihood = ("ode",)
    with pytest.raises(UserError, match="no 8-bit images but latents"):
        loop.prepared(config)
    with pytest.raises(UserError, match="changes pixels"):
        translation(latents(str(folder), num_classes=10, codec=CODEC), Coarse())


@pytest.mark.thorough
def test_an_exported_sampler_decodes(run):
    sampler = portable_sampler(portable_model(run), run.recipe)
    code = serialise(sampler, (4, 4, 4), run.parts.wired.condition, platforms=["cpu"])
    labels = np.arange(3, dtype=np.int32)
    images = export.deserialize(bytearray(code)).call(np.uint32(2), labels)
    np.testing.assert_allclose(images, run.sample(labels, seed=2), rtol=1e-5, atol=1e-3)


def test_pairs_of_latents_keep_the_codec(folder, tmp_path):
    rows = np.zeros((4, 4, 4, 4), np.float32)
    np.savez(tmp_path / "pairs.npz", image=rows, source=rows, label=np.arange(4))
    data = latents(str(folder), num_classes=10, codec=CODEC)
    assert pairs(data, str(tmp_path / "pairs.npz")).codec == data.codec


def run_program(program, workdir, *argv):
    argv = [f"--workdir={workdir}", "--allowed_packages=tests", *argv]
    assert cli.run(program.main, program.FLAGS, usage="", argv=argv) == 0


@pytest.mark.thorough
def test_the_command_line_shows_decoded_images_and_pairs_of_latents(workdir, tmp_path, capsys):
    out = tmp_path / "some.png"
    run_program(sample, workdir, "--num_samples=4", f"--out={out}", f"--film={tmp_path}/film.png")
    assert np.load(out.with_suffix(".npz"))["images"].shape == (4, 8, 8, 1)
    assert Image.open(tmp_path / "film.png").mode == "L"
    drawn = tmp_path / "pairs.npz"
    run_program(reflow, workdir, "--num_pairs=4", f"--out={drawn}")
    assert np.load(drawn)["image"].shape == np.load(drawn)["source"].shape == (4, 4, 4, 4)
    edited = tmp_path / "edited.png"
    how = ["--num_images=2", "--num_steps=2", f"--out={edited}"]
    run_program(edit, workdir, "--task=inpaint", "--method=replace", *how)
    assert Image.open(edited).mode == "L"
    argv = [f"--workdir={workdir}", "--allowed_packages=tests", "--task=deblur", *how]
    assert cli.run(edit.main, edit.FLAGS, usage="", argv=argv) == 2
    assert "error: task=deblur observes pixels" in capsys.readouterr().err
