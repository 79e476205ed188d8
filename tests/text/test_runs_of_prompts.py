"""A run that is conditioned on prompts: training, sampling, guidance away from texts."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffjax.data import captioned_folder
from diffjax.data.latents import latents_in
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.loop import loop
from diffjax.models.bert.network import Bert
from diffjax.models.bert.published import FAMILY as BERT
from diffjax.models.dit import DiT
from diffjax.pretrained.folders import write_folder
from diffjax.spec import build, spec
from diffjax.text import read_text_encoder
from experiments import encode_latents, sample
from experiments.flags import cli
from tests.models.published.test_families import drawn
from tests.support.tiny_run import loaded, on_one_device, tiny_config
from tests.support.vocabularies import write_bert

pytest.importorskip("tokenizers", reason="pip install -e '.[text]'")
WORDS = ("dark", "light", "red apple", "")


def write_encoder(folder):
    """A folder with a small text encoder of drawn weights."""
    network = Bert(8, 1, 2, vocabulary=140, length=16)
    entries = BERT.config.entries(network) if BERT.config else {}
    state = BERT.to_theirs(drawn(BERT, network), network)
    write_folder(folder, state, entries, name="model")
    return write_bert(folder)


def write_captioned(folder, count=40, size=2):
    """Images `[size, size, 3]` with captions: half in a list, half in files beside them."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        number = count if part == "train" else count // 4
        images = rng.integers(0, 256, (number, size, size, 3), dtype=np.uint8)
        rows = []
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / part / f"{i:03d}.png")
            rows.append({"file_name": f"{i:03d}.png", "text": WORDS[i % len(WORDS)], "more": 1})
            if part == "test":
                (folder / part / f"{i:03d}.txt").write_text(f" {WORDS[i % len(WORDS)]}\n")
        if part == "train":
            lines = "\n".join(map(json.dumps, rows))
            (folder / part / "metadata.jsonl").write_text(lines + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an encoder, captioned images, and their latents with states."""
    place = tmp_path_factory.mktemp("captioned")
    write_encoder(place / "encoder")
    write_captioned(place / "images")
    argv = ["--config=configs/captions.py", f"--config.data.path={place / 'images'}"]
    argv += ["--config.data.image_size=2", "--codec=space_to_depth:block=2"]
    argv += [f"--text={place / 'encoder'}:length=8", f"--out={place / 'latents'}"]
    assert cli.run(encode_latents.main, encode_latents.FLAGS, usage="", argv=argv) == 0
    return place


@pytest.mark.thorough(tenth=False)
def test_latents_have_the_states_of_their_captions(place):
    dataset = build(latents_in(str(place / "latents")))
    condition = dataset.condition
    encoder = read_text_encoder(place / "encoder", length=8)
    assert condition.sha256 == encoder.sha256
    assert len(dataset.train) == 40
    batch = dataset.train.gather([2, 4, 39])
    assert [dataset.train.captions[row] for row in (2, 4, 39)] == ["red apple", "dark", ""]
    expected = encoder(["red apple", "dark", ""])
    found = condition.of_batch(batch)
    np.testing.assert_allclose(found.states, expected.states, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(found.mask, expected.mask)
    assert found.states.dtype == np.float32
    images = captioned_folder(str(place / "images"), image_size=2)
    assert dataset.test.captions == images.test.captions == tuple(WORDS[i % 4] for i in range(10))
    # No token and zeros are the null condition.
    assert not condition.null(2).mask.any()


def test_another_encoder_is_refused(place, tmp_path):
    folder = shutil.copytree(place / "encoder", tmp_path / "encoder")
    condition = build(latents_in(str(place / "latents"))).condition
    moved = replace(condition, encoder=replace(condition.encoder, folder=str(folder)))
    assert moved.parse(["dark"]).mask.any()
    with (folder / "vocab.txt").open("a") as file:
        file.write("pear\n")
    changed = replace(condition, encoder=replace(condition.encoder, folder=str(folder)))
    with pytest.raises(UserError, match=f"the text encoder {folder} has sha256"):
        changed.parse(["dark"])
    config = latents_in(str(place / "latents")).unlock()
    config.given.sha256 = "0" * 64
    with pytest.raises(UserError, match=r"a text encoder of sha256 .* has read the captions"):
        build(config)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "test/003.txt").unlink(), "003.png has no caption: write"),
        (lambda folder: (folder / "test/003.txt").write_bytes(b"\xe9"), "is not UTF-8"),
        (lambda folder: (folder / "train/003.png").unlink(), "there is no picture 003.png"),
        (
            lambda folder: (folder / "train/metadata.jsonl").write_text('{"file_name": 3}'),
            "metadata.jsonl, line 1 has no text 'file_name'",
        ),
        (shutil.rmtree, "set data.path to a folder of images"),
    ],
)
def test_half_a_captioned_folder_is_refused(tmp_path, break_it, message):
    folder = write_captioned(tmp_path / "images", count=16)
    break_it(folder)
    with pytest.raises(UserError, match=re.escape(message)):
        captioned_folder(str(folder))


def test_an_encoder_needs_captions_and_known_settings(place, tmp_path, capsys):
    argv = ["--config=configs/digits.py", "--codec=space_to_depth", f"--out={tmp_path / 'out'}"]
    for text, message in (
        (f"{place / 'encoder'}", "texts of 512 tokens are longer than this encoder reads"),
        (f"{place / 'encoder'}:length=8", "digits has 0 captions of 1797 images"),
        (f"{place / 'encoder'}:lenght=8", "has no setting 'lenght'; did you mean 'length'?"),
        (f"{tmp_path / 'none'}", "none"),
    ):
        run = [*argv, f"--text={text}"]
        assert cli.run(encode_latents.main, encode_latents.FLAGS, usage="", argv=run) == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def workdir(place):
    """A run of four steps on them."""
    config = tiny_config("objective=flow").unlock()
    config.data = latents_in(str(place / "latents"))
    config.model = spec(DiT, patch_size=1, hidden_size=16, depth=1, num_heads=2)
    config.num_steps, config.batch_size = 4, 16
    config.evaluation.extractor = spec(pixel_features, size=1)
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        loop.train(config.lock(), place / "run")
    return place / "run"


@pytest.mark.thorough
def test_texts_are_sampled_and_left(workdir, tmp_path, capsys):
    run = loaded(workdir)
    condition = run.parts.wired.condition
    texts = ["a red apple", "dark"]
    found = run.sample(texts, against=["light", "apple"], guidance_scale=3.0)
    assert found.shape == (2, 2, 2, 3)  # decoded
    one = run.sample(texts, against="prompt:light", guidance_scale=3.0)
    np.testing.assert_allclose(found[0], one[0], atol=1e-6)
    ready = run.sample(condition.parse(texts), against=["light"] * 2, guidance_scale=3.0)
    np.testing.assert_array_equal(ready, one)
    # No token is the null condition.
    away = run.sample(texts, against=condition.null(2), guidance_scale=3.0)
    np.testing.assert_allclose(run.sample(texts, guidance_scale=3.0), away, atol=1e-6)
    file = tmp_path / "prompts.txt"
    file.write_text("a red apple\ndark\n", encoding="utf-8")
    argv = [f"--workdir={workdir}", f"--out={tmp_path / 'a.png'}", "--allowed_packages=tests"]
    argv += [f"--prompts=@{file}"]
    assert cli.run(sample.main, sample.FLAGS, usage="", argv=argv) == 0
    with np.load(tmp_path / "a.npz") as saved:
        np.testing.assert_array_equal(saved["images"], run.sample(texts))
        np.testing.assert_array_equal(saved["text_states"], condition.parse(texts).states)
    file.write_bytes("é".encode("latin-1"))
    assert cli.run(sample.main, sample.FLAGS, usage="", argv=argv) == 2
    assert "can't read conditions from" in capsys.readouterr().err
    with pytest.raises(UserError, match="a prompt is a text, and 3 is not one"):
        run.sample([3])
