"""Preparing captioned emoji, and judging the samples of a run on captioned pictures."""

import io
import json
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from diffjax.autoencoders.encoding import Stored, encode
from diffjax.codecs import SpaceToDepth
from diffjax.data import captioned_folder
from diffjax.data.latents import latents_in
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.loop import loop
from diffjax.models.dit import DiT
from diffjax.spec import spec
from diffjax.text import FolderEncoder, prompts
from experiments import match_prompts, prepare_emoji
from experiments.flags import cli
from tests.support.tiny_run import on_one_device, tiny_config
from tests.text.test_runs_of_prompts import write_encoder


def _archive(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def _webp(width, height, colour):
    file = io.BytesIO()
    Image.new("RGBA", (width, height), colour).save(file, "WEBP", lossless=True)
    return file.getvalue()


def test_pictures_are_named_split_and_laid_on_white(tmp_path, monkeypatch):
    names = {
        "\U0001f49a": {"en": ":green_heart:"},
        "❤️": {"en": ":red_heart:"},
        "\U0001f44d\U0001f3ff": {"en": ":thumbs_up_dark_skin_tone:"},
        "#\ufe0f\u20e3": {"en": ":keycap_#:"},
    }
    monkeypatch.setitem(sys.modules, "emoji", SimpleNamespace(EMOJI_DATA=names))
    # The selector fe0f may be missing; pictures without a name are left out.
    pictures = {
        "1f49a": (8, 8),
        "2764": (8, 10),
        "1f44d-1f3ff": (8, 8),
        "0023-fe0f-20e3": (8, 8),
        "1f999": (8, 8),
    }
    clear = {f"package/assets/{points}.webp": _webp(*size, (255, 0, 0, 255 * (points != "1f49a")))
             for points, size in pictures.items()}  # fmt: skip
    _archive(tmp_path / prepare_emoji.PICTURES.name, clear)
    groups = {"\U0001f44d": {"group": "People & Body"}, "❤️": {"group": "Smileys & Emotion"}}
    _archive(
        tmp_path / prepare_emoji.GROUPS.name,
        {"package/data-by-emoji.json": json.dumps(groups).encode()},
    )
    assert prepare_emoji.write_pictures(tmp_path, tmp_path / "out", 16) == (3, 1)
    dataset = captioned_folder(str(tmp_path / "out"), image_size=16)
    assert dataset.train.captions == ("keycap #", "thumbs up dark skin tone", "red heart")
    assert dataset.test.captions == ("green heart",)
    assert (dataset.test[0]["image"] == 255).all()  # transparent
    heart = dataset.train[2]["image"]
    assert (heart[:, 0] == 255).all()  # beside it
    np.testing.assert_array_equal(heart[8, 8], [255, 0, 0])
    lines = (tmp_path / "out/train/metadata.jsonl").read_text().splitlines()
    tones = {"skin tone": "dark", "group": "People & Body"}
    assert json.loads(lines[1])["attributes"] == tones


def test_without_a_network_it_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_emoji, "_downloaded", lambda file, folder: False)
    (tmp_path / "taef2_encoder.pth").write_bytes(b"")
    with pytest.raises(UserError) as error:
        prepare_emoji.fetch(tmp_path)
    assert f"put into {tmp_path} the files" in str(error.value)
    assert "taef2_decoder.pth (https://github.com" in str(error.value)
    assert "taef2_encoder.pth" not in str(error.value)
    for file in prepare_emoji.ALL:
        (tmp_path / file.name).write_bytes(b"")
    with pytest.raises(UserError, match="it is damaged or another version"):
        prepare_emoji.fetch(tmp_path)


@pytest.mark.thorough
def test_samples_of_a_run_are_judged_on_a_page(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers", reason="pip install -e '.[text]'")
    rng = np.random.default_rng(0)
    for part, number in (("train", 12), ("test", 4)):
        (tmp_path / "pictures" / part).mkdir(parents=True)
        rows = []
        for i in range(number):
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / part / f"{i:02d}.png")
            attributes = {"half": ("low", "high")[i % 2]} if i < 6 else {}
            rows.append({"file_name": f"{i:02d}.png", "text": f"no {i}", "attributes": attributes})
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / "pictures" / part / "metadata.jsonl").write_text(lines)
    text = prompts(FolderEncoder(str(write_encoder(tmp_path / "encoder")), length=8), null=None)
    dataset = captioned_folder(str(tmp_path / "pictures"), 64)
    encode(dataset, SpaceToDepth(16), tmp_path / "latents", Stored(text=text))
    config = tiny_config("objective=flow").unlock()
    config.data = latents_in(str(tmp_path / "latents"))
    config.model = spec(DiT, patch_size=1, hidden_size=16, depth=1, num_heads=2)
    config.num_steps, config.batch_size = 2, 8
    config.evaluation.extractor = spec(pixel_features, size=1)
    config.evaluation.num_samples = 4
    on_one_device(monkeypatch)
    loop.train(config.lock(), tmp_path / "run")
    argv = [f"--workdir={tmp_path / 'run'}", f"--pictures={tmp_path / 'pictures'}"]
    argv += ["--num_prompts=8", "--of=5", "--guidance_scales=1,2", "--batch_size=16"]
    assert cli.run(match_prompts.main, match_prompts.FLAGS, usage="", argv=argv) == 0
    result = json.loads((tmp_path / "run/match/match.json").read_text())
    assert [row["part"] for row in result["rows"]] == ["seen", "held out"] * 2
    assert 0 <= result["rows"][0]["shares"]["caption"] <= 1
    assert result["counts"] == {"caption, seen": 8, "half, seen": 6, "half, held out": 4}
    # On real pictures, which are noise of their own, the classifier of captions is right.
    assert result["real"]["caption, seen"] > 0.9
    page = (tmp_path / "run/match/match.html").read_text()
    assert "scale 2" in page
    assert "half, held out (4)" in page
    argv[0] = f"--workdir={tmp_path / 'none'}"
    assert cli.run(match_prompts.main, match_prompts.FLAGS, usage="", argv=argv) == 2
    argv += ["--guidance_scales=1,x"]
    assert cli.run(match_prompts.main, match_prompts.FLAGS, usage="", argv=argv) == 2
    assert "'x' is no number" in capsys.readouterr().err
