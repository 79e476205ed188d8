"""Text encoders with their tokenizers, combinations of them, and prompts as conditions."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.conditions import TokenStates
from diffjax.errors import UserError
from diffjax.models.bert.network import Bert
from diffjax.models.bert.published import FAMILY as BERT
from diffjax.models.clip_text.network import ClipText
from diffjax.models.clip_text.published import FAMILY as CLIP
from diffjax.models.t5.network import T5Encoder
from diffjax.models.t5.published import FAMILY as T5
from diffjax.pretrained.folders import write_folder
from diffjax.runs.samples import condition_files
from diffjax.spec import as_spec, build, from_json, to_json
from diffjax.text import (
    AlongFeatures,
    AlongTokens,
    PooledFrom,
    TextEncoder,
    Zeros,
    prompts,
    read_text_encoder,
    read_tokenizer,
)
from diffjax.text import encoders as encoders_file
from diffjax.text.encoders import Sizes
from tests.models.published.test_families import drawn
from tests.support.vocabularies import AWKWARD, write_bert, write_clip, write_t5
from tests.text.test_tokenizers import minilm

pytest.importorskip("tokenizers", reason="pip install -e '.[text]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders as in diffusers: `text_encoder`, `text_encoder_2`, `text_encoder_3`, tokenizers."""
    place = tmp_path_factory.mktemp("pipeline")
    words = [
        write_clip(place / "tokenizer"),
        write_clip(place / "tokenizer_2", pad="!"),
        write_t5(place / "tokenizer_3"),
    ]
    sizes = [read_tokenizer(folder).library.get_vocab_size() for folder in words]
    networks = [
        ClipText(8, 2, 2, vocabulary=sizes[0], length=9),
        ClipText(12, 2, 2, 5, vocabulary=sizes[1], length=9, activation="gelu"),
        T5Encoder(24, 1, 2, 12, vocabulary=sizes[2], head_width=4),
    ]
    for number, (family, network) in enumerate(zip((CLIP, CLIP, T5), networks, strict=True)):
        name = f"text_encoder{f'_{number + 1}' if number else ''}"
        state = family.to_theirs(drawn(family, network), network)
        assert family.config
        write_folder(place / name, state, family.config.entries(network), name="model")
    return place


@pytest.fixture(scope="module")
def clip_l(folder):
    return read_text_encoder(folder / "text_encoder", layer=-2, normed=False, padding=True)


@pytest.fixture(scope="module")
def clip_g(folder):
    return read_text_encoder(folder / "text_encoder_2", layer=-2, normed=False, padding=True)


@pytest.fixture(scope="module")
def t5(folder):
    return read_text_encoder(folder / "text_encoder_3", padding=True)


TEXTS = ["a red apple", "", "wow", "a red apple"]


def test_states_are_those_of_the_chosen_layer(clip_l):
    found = clip_l(TEXTS)
    ids, _ = clip_l.loaded.tokenizer(TEXTS)
    states = jax.jit(clip_l.loaded.network.apply)({"params": clip_l.loaded.params}, ids[:, 0])
    np.testing.assert_allclose(found.states, states.hidden[1], atol=1e-5)
    np.testing.assert_allclose(found.pooled, states.pooled, atol=1e-5)
    assert found.mask.all()
    assert tuple(clip_l.sizes) == (9, 8, 8)


def test_a_text_is_encoded_once_a_call_and_one_program_serves_many_numbers(clip_l, monkeypatch):
    seen = []
    monkeypatch.setattr(
        encoders_file, "_program", lambda: lambda *args: seen.append(args[4]) or _nothing(args)
    )
    clip_l(["a", "b", "a", "a", "b", "c"])
    clip_l(["a", "b", "c", "d"])
    assert clip_l([]).states.shape == (0, 9, 8)
    assert [ids.shape for ids in seen] == [(4, 9), (4, 9)]


def _nothing(args):
    rows = len(args[4])
    return np.zeros((rows, 9, 8), np.float32), np.zeros((rows, 8), np.float32)


def test_chunks_follow_each_other(clip_l):
    """The second chunk has the states of its words alone; the first one the pooled vector."""
    long = TextEncoder(
        clip_l.loaded.tokenizer, clip_l.loaded.network, clip_l.loaded.params, padding=True, chunks=2
    )
    plain = TextEncoder(
        clip_l.loaded.tokenizer, clip_l.loaded.network, clip_l.loaded.params, padding=True
    )
    found = long(["red " * 7 + "wow apple"])
    parts = plain(["red " * 7, "wow apple"])
    np.testing.assert_allclose(found.states[0], np.concatenate(parts.states), atol=1e-5)
    np.testing.assert_allclose(found.pooled[0], parts.pooled[0], atol=1e-5)
    assert tuple(long.sizes) == (18, 8, 8)


def test_padding_is_masked_where_it_is_no_token(folder):
    encoder = read_text_encoder(folder / "text_encoder_3")
    found, longer = encoder(TEXTS), read_text_encoder(folder / "text_encoder_3", length=20)(TEXTS)
    assert found.mask.sum(1).tolist() == [4, 1, 5, 4]
    np.testing.assert_allclose(found.states[found.mask], longer.states[longer.mask], atol=1e-5)


def test_encoders_are_combined_as_in_sdxl_sd3_and_flux(clip_l, clip_g, t5):
    low, g, long = (encoder(TEXTS) for encoder in (clip_l, clip_g, t5))
    sdxl = AlongFeatures((clip_l, clip_g), pooled=(1,))
    sd3 = AlongTokens((AlongFeatures((clip_l, clip_g), pooled=(0, 1)), t5))
    flux = PooledFrom(t5, clip_l)
    found = sdxl(TEXTS)
    np.testing.assert_array_equal(found.states, np.concatenate([low.states, g.states], -1))
    np.testing.assert_array_equal(found.pooled, g.pooled)
    found = sd3(TEXTS)
    np.testing.assert_array_equal(found.states[:, :9, :8], low.states)
    np.testing.assert_array_equal(found.states[:, :9, 8:20], g.states)
    assert not found.states[:, :9, 20:].any()
    np.testing.assert_array_equal(found.states[:, 9:], long.states)
    np.testing.assert_array_equal(found.pooled, np.concatenate([low.pooled, g.pooled], -1))
    found = flux(TEXTS)
    np.testing.assert_array_equal(found.states, long.states)
    np.testing.assert_array_equal(found.pooled, low.pooled)
    for combined, sizes in ((sdxl, (9, 20, 5)), (sd3, (21, 24, 13)), (flux, (12, 24, 8))):
        assert tuple(combined.sizes) == sizes
        found = combined(TEXTS)
        assert (*found.states.shape[1:], found.pooled.shape[1]) == sizes
        assert found.mask.shape == found.states.shape[:2]


@pytest.mark.thorough
def test_weights_in_half_precision_return_close_states_in_float32(folder, clip_g, t5):
    for number, whole in ((2, clip_g), (3, t5)):
        place = folder / f"text_encoder_{number}"
        how = {"layer": whole.layer, "normed": whole.normed, "padding": True}
        half = read_text_encoder(place, dtype="bfloat16", **how)
        assert {leaf.dtype for leaf in jax.tree.leaves(half.loaded.params)} == {
            jnp.dtype("bfloat16")
        }
        found, expected = half(TEXTS).states, whole(TEXTS).states
        assert found.dtype == np.float32
        assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


class TestPrompts:
    def test_texts_of_all_origins_are_parsed(self, clip_l, tmp_path):
        kind = prompts(clip_l)
        expected = clip_l(["a red apple", "wow, so red"])
        file = tmp_path / "prompts.txt"
        file.write_text("\ufeffa red apple\r\n\nwow, so red\n", encoding="utf-8")
        for found in (
            kind.of(["a red apple", "wow, so red"]),
            condition_files.read(kind, ["a red apple", "wow, so red"]),
            condition_files.read(kind, [f"@{file}"]),
        ):
            jax.tree.map(np.testing.assert_array_equal, found, expected)
        file.write_bytes("é".encode("latin-1"))
        with pytest.raises(UserError, match=r"can't read conditions from .*utf-8"):
            condition_files.read(kind, [f"@{file}"])

    def test_the_empty_text_is_the_null_condition(self, clip_l):
        kind = prompts(clip_l)
        cond = kind.parse(["a red apple", "wow"])
        null = jax.jit(kind.nulled)(cond)
        jax.tree.map(np.testing.assert_array_equal, null, clip_l(["", ""]))
        dropped = jax.jit(kind.drop)(jax.random.key(0), cond, 1.0)
        jax.tree.map(np.testing.assert_array_equal, dropped, null)
        kind.check(cond)
        kind.check(null)

    def test_it_is_recorded_by_the_folders_of_its_encoders(self, clip_l, clip_g, t5):
        sd3 = AlongTokens((AlongFeatures((clip_l, clip_g), pooled=(0, 1)), t5))
        for kind in (prompts(sd3), prompts(PooledFrom(t5, clip_l), null=None)):
            again = build(from_json(to_json(as_spec(kind))))
            assert again == kind
            assert hash(again) == hash(kind)

    def test_or_no_token_is(self, clip_l):
        null = prompts(clip_l, null=None).null(2)
        assert not null.mask.any()
        assert not null.states.any()
        assert isinstance(null, TokenStates)

    def test_what_is_no_prompt_ends_in_one_line(self, clip_l):
        with pytest.raises(UserError, match="a prompt is a text, and 3 is not one"):
            prompts(clip_l).parse([3])
        with pytest.raises(UserError, match="the prompt 'red' needs a text encoder"):
            replace(prompts(clip_l), encoder=None).parse(["red"])


def test_what_does_not_fit_ends_in_one_line(folder, clip_l, clip_g, t5, tmp_path):
    with pytest.raises(UserError, match="layer=3: this encoder has layers from 0 to 2"):
        read_text_encoder(folder / "text_encoder", layer=3)
    with pytest.raises(UserError, match="a text encoder has no setting 'layr'; did you mean"):
        read_text_encoder(folder / "text_encoder", layr=3)
    with pytest.raises(UserError, match="chunks=0: a text is read in one part at least"):
        read_text_encoder(folder / "text_encoder", chunks=0)
    with pytest.raises(UserError, match="10 tokens are longer than this encoder reads: set length"):
        read_text_encoder(folder / "text_encoder", length=10)
    with pytest.raises(UserError, match="they are of different models"):
        read_text_encoder(folder / "text_encoder_3", folder / "tokenizer")
    with pytest.raises(UserError, match="has no tokenizer: one of"):
        read_text_encoder(folder / "text_encoder", folder / "text_encoder")
    with pytest.raises(UserError, match="encoders along features have texts of one length, not"):
        _ = AlongFeatures((clip_l, t5), pooled=(0,)).sizes
    with pytest.raises(UserError, match=r"pooled=\(2,\): encoders are counted from 0 to 1"):
        AlongFeatures((clip_l, clip_g), pooled=(2,))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=re.escape("has no weights")):
        read_text_encoder(tmp_path)


@pytest.mark.parity
def test_minilm_is_that_of_transformers():
    """With the published weights, on texts of unlike lengths; pooled by their mean."""
    folder = minilm()
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")
    encoder = read_text_encoder(folder, length=64)
    assert encoder.loaded.network == Bert()
    found = encoder(AWKWARD)
    peer = transformers.BertModel.from_pretrained(folder).eval()
    words = transformers.BertTokenizer.from_pretrained(folder)
    inputs = words(
        list(AWKWARD), padding="max_length", truncation=True, max_length=64, return_tensors="pt"
    )
    with torch.inference_mode():
        states = peer(**inputs).last_hidden_state
    kept = inputs["attention_mask"][..., None]
    pooled = (states * kept).sum(1) / kept.sum(1)
    for ours, theirs in ((found.states[found.mask], states[kept[..., 0].bool()]),
                         (found.pooled, pooled)):  # fmt: skip
        error = np.linalg.norm(ours - theirs.numpy()) / np.linalg.norm(theirs.numpy())
        assert error < 1e-5


def test_a_written_bert_is_read_with_its_tokenizer(tmp_path):
    network = Bert(8, 1, 2, vocabulary=200, length=16)
    assert BERT.config
    write_folder(tmp_path, BERT.to_theirs(drawn(BERT, network), network),
                 BERT.config.entries(network), name="model")  # fmt: skip
    write_bert(tmp_path)
    found = read_text_encoder(tmp_path, length=16)(["red apple", ""])
    assert found.mask.sum(1).tolist() == [5, 2]


def test_a_combination_with_zeros_has_a_hash_and_is_released(folder):
    """As Stable Diffusion 3 without T5, when it is tuned: its states depend on the sizes alone."""
    read = read_text_encoder(folder / "text_encoder", folder / "tokenizer")
    one, other = (AlongTokens((read, Zeros(Sizes(n, read.sizes.width, 0)))) for n in (3, 4))
    assert len(one.sha256) == 64
    assert one.sha256 != other.sha256
    one.release()
