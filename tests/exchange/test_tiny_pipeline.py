"""A pipeline of Stable Diffusion of drawn weights: states in a file, sampled, written again."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import diffjax
from diffjax.errors import UserError
from diffjax.exchange.convert import convert
from diffjax.models.kandinsky.network import KandinskyUNet
from diffjax.models.kandinsky.published import FAMILY as KANDINSKY
from diffjax.runs.samples.condition_files import read_states
from tests.models.published.test_families import SMALL
from tests.support.tiny_pipeline import SIDE, WIDTH, write_pipeline

pytest.importorskip("tokenizers", reason="pip install -e '.[text]'")
TEXTS = ["red", "blue"]
HOW = {"num_steps": 3, "guidance_scale": 1.0, "seed": 4}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "pipe")


@pytest.fixture(scope="module")
def run(pipe):
    return diffjax.from_pretrained(pipe)


def test_states_in_a_file_are_the_condition_without_text_encoders(pipe, tmp_path):
    file, rng = tmp_path / "states.safetensors", np.random.default_rng(0)
    states, away = rng.normal(size=(2, 2, 77, WIDTH)).astype(np.float32)
    save_file({"prompt_embeds": states, "negative_prompt_embeds": away[:1]}, file)
    without = diffjax.from_pretrained(pipe, texts=False)
    kind = without.parts.wired.condition
    condition, negative = read_states(kind, str(file))
    np.testing.assert_array_equal(condition.states, states)
    np.testing.assert_array_equal(negative.states, away[:1])
    assert condition.mask.all()
    save_file({"prompt_embeds": np.zeros((2, 9, WIDTH), np.float32)}, file)
    with pytest.raises(UserError, match=r"need an array of shape \(2, 77, 8\), not \(2, 9, 8\)"):
        read_states(kind, str(file))
    save_file({"embeds": states}, file)
    with pytest.raises(UserError, match="has no prompt_embeds, but embeds"):
        read_states(kind, str(file))


def test_a_pipeline_draws_and_is_written_without_a_change(pipe, run, tmp_path):
    pictures = run.sample(TEXTS, **HOW)
    assert pictures.shape == (2, SIDE, SIDE, 3)
    assert np.isfinite(pictures).all()
    assert np.abs(pictures[0] - pictures[1]).max() > 0.01
    convert(str(pipe), "diffusers", tmp_path / "out")
    again = diffjax.from_pretrained(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.params, run.params)
    assert again.config.sampling.to_dict() == run.config.sampling.to_dict()
    texts = (each.parts.wired.condition.parse(TEXTS) for each in (run, again))
    jax.tree.map(np.testing.assert_array_equal, *texts)


@pytest.mark.thorough(tenth=False)
def test_a_pipeline_that_is_written_draws_the_same(pipe, run, tmp_path):
    convert(str(pipe), "diffusers", tmp_path / "out")
    again = diffjax.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(again.sample(TEXTS, **HOW), run.sample(TEXTS, **HOW))


def test_entries_of_the_scheduler_take_the_place_of_the_folders(pipe, run):
    entries = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    other = diffjax.from_pretrained(pipe, components={"scheduler": entries})
    assert repr(other.parts.wired.precond.target) == "V()"
    assert repr(run.parts.wired.precond.target) == "Noise()"
    with pytest.raises(UserError, match="has no place for a component 'schedular'; did you mean"):
        diffjax.from_pretrained(pipe, components={"schedular": entries})


@pytest.mark.parametrize("text_width", [0, 5], ids=["2.2", "2.1"])
def test_a_decoder_of_kandinsky_is_known_by_its_config(text_width):
    """All that tensors do not show is in the entries, and what they show is in both."""
    tokens = 10 if text_width else 32
    how = {"num_image_tokens": tokens, "text_width": text_width, "image_width": 6, "num_groups": 4}
    denoiser = KANDINSKY.network(**SMALL["Kandinsky 2"] | how)
    assert isinstance(denoiser.network, KandinskyUNet)
    config = KANDINSKY.config
    assert config is not None
    entries = dict(config.entries(denoiser))
    settings = config.settings(entries, "x")
    assert settings["image_shape"] == denoiser.image_shape
    assert settings["token_levels"] == denoiser.network.token_levels
    assert settings["head_channels"] == denoiser.network.head_channels
    entries["up_block_types"] = entries["up_block_types"][::-1]
    with pytest.raises(UserError, match="do not mirror down_block_types"):
        config.settings(entries, "x")
