"""A run that is conditioned on prompts: training, sampling, guidance away from texts."""

import numpy as np
import pytest

from diffjax.data import ArraySource, DataSet, GivenSource
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.loop import loop
from diffjax.models.bert.network import Bert
from diffjax.models.bert.published import FAMILY as BERT
from diffjax.models.dit import DiT
from diffjax.pretrained.folders import write_folder
from diffjax.spec import spec
from diffjax.text import prompts, read_text_encoder
from experiments import cli, sample
from tests.models.test_families import drawn
from tests.support.tiny_run import loaded, on_one_device, tiny_config
from tests.support.vocabularies import write_bert

pytest.importorskip("tokenizers", reason="pip install -e '.[text]'")
WORDS = ("dark", "light", "red apple", "")


def captioned(folder: str, num_images: int = 160, null: str | None = "") -> DataSet:
    """Images `[1, 1, 1]` with captions, whose states are encoded once."""
    kind = prompts(read_text_encoder(folder, length=8), null=null)
    captions = [WORDS[i % len(WORDS)] for i in range(num_images)]
    given = kind.arrays(kind.parse(captions))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_images, 1, 1, 1), dtype=np.uint8)

    def source(rows: slice) -> GivenSource:
        own = ArraySource(images[rows], np.zeros(len(images[rows]), np.int32))
        return GivenSource(own, {name: part[rows] for name, part in given.items()})

    last = num_images // 4
    return DataSet(
        "captioned", source(slice(last, None)), source(slice(last)), (1, 1, 1), 0, (), given=kind
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of four steps, and the encoder beside it."""
    place = tmp_path_factory.mktemp("prompts")
    network = Bert(8, 1, 2, vocabulary=140, length=16)
    entries = BERT.config.entries(network) if BERT.config else {}
    state = BERT.to_theirs(drawn(BERT, network), network)
    write_folder(place / "encoder", state, entries, name="model")
    write_bert(place / "encoder")
    config = tiny_config("objective=flow").unlock()
    config.data = spec(captioned, folder=str(place / "encoder"))
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
    assert found.shape == (2, 1, 1, 1)
    one = run.sample(texts, against="prompt:light", guidance_scale=3.0)
    np.testing.assert_allclose(found[0], one[0], atol=1e-6)
    ready = run.sample(condition.parse(texts), against=["light"] * 2, guidance_scale=3.0)
    np.testing.assert_array_equal(ready, one)
    # The empty text is the null condition.
    away = run.sample(texts, against=[""] * 2, guidance_scale=3.0)
    np.testing.assert_allclose(run.sample(texts, guidance_scale=3.0), away, atol=1e-6)
    file = tmp_path / "prompts.txt"
    file.write_text("a red apple\ndark\n", encoding="utf-8")
    argv = [f"--workdir={workdir}", f"--out={tmp_path / 'a.png'}", "--allowed_packages=tests"]
    argv += ["--num_samples=2", f"--labels=@{file}"]
    assert cli.run(sample.main, sample.FLAGS, usage="", argv=argv) == 0
    with np.load(tmp_path / "a.npz") as saved:
        np.testing.assert_array_equal(saved["images"], run.sample(texts))
        np.testing.assert_array_equal(saved["text_states"], condition.parse(texts).states)
    file.write_bytes("é".encode("latin-1"))
    assert cli.run(sample.main, sample.FLAGS, usage="", argv=argv) == 2
    assert "can't read conditions from" in capsys.readouterr().err
    with pytest.raises(UserError, match="a prompt is a text, and 3 is not one"):
        run.sample([3])
