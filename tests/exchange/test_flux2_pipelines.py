"""Flux.2 of diffusers: the whole picture, from folders that it saved, by texts or their states."""

from typing import Any

import numpy as np
import pytest

import diffjax
from diffjax.errors import UserError
from diffjax.runs.samples.model import Request
from experiments import sample
from experiments.flags import cli
from tests.exchange.test_pipelines import NUM_STEPS, PROMPT, needed, redrawn
from tests.support.messages import error_line

LENGTH, WIDTH, DEPTH = 40, 24, 4
LAYERS = (1, 2, 3)
HEIGHT, COLUMNS = 64, 96
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content"
    " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""Qwen3's template for messages without tools."""


def words_of(transformers):
    """A byte-level vocabulary with a few pairs, as Qwen's."""
    letters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(68)]
    vocabulary = {word: i for i, word in enumerate([*letters, "ap", "app", "re", "red"])}
    merges = [("a", "p"), ("ap", "p"), ("r", "e"), ("re", "d")]
    made = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=512)
    more = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made.add_special_tokens({"additional_special_tokens": more[1:]})
    made.add_tokens(["<think>", "</think>"])
    made.chat_template = CHAT
    return made


def encoder_of(transformers, words):
    config = transformers.Qwen3Config(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return redrawn(transformers.Qwen3ForCausalLM(config), 1)


def autoencoder_of(diffusers):
    import torch

    network = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        layers_per_block=1,
        latent_channels=4,
    )
    generator = torch.Generator().manual_seed(4)
    network.bn.running_mean = torch.randn(16, generator=generator)
    network.bn.running_var = 0.5 + torch.rand(16, generator=generator)
    return redrawn(network, 3)


def klein(distilled=True, guidance=False, kind="Flux2KleinPipeline", **parts):
    _, diffusers, transformers = needed()
    network = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=256,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    words = words_of(transformers)
    given = {
        "transformer": redrawn(network, 2),
        "text_encoder": encoder_of(transformers, words),
        "tokenizer": words,
        "vae": autoencoder_of(diffusers),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=3.0
        ),
        **({"is_distilled": distilled} if "Klein" in kind else {}),
    }
    return getattr(diffusers, kind)(**given | parts)


def picture_of(pipe, length, **how):
    import torch

    pipe.set_progress_bar_config(disable=True)
    noise = Request(np.zeros(1), seed=3).noise((HEIGHT // 16, COLUMNS // 16, 16))
    found = pipe(
        latents=torch.tensor(np.array(noise).transpose(0, 3, 1, 2)),
        num_inference_steps=NUM_STEPS,
        max_sequence_length=length,
        text_encoder_out_layers=LAYERS,
        output_type="np",
        height=HEIGHT,
        width=COLUMNS,
        **how,
    ).images
    return 2 * found - 1


def check(found, expected):
    assert 0.1 < expected.std() < 0.95
    assert np.abs(found - expected).max() < 2 / 255  # of a range of 2


@pytest.mark.parity
@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("distilled", [True, False], ids=["distilled", "guided"])
def test_klein_by_its_text_encoder_is_that_of_diffusers(distilled, tmp_path):
    """Three layers of Qwen3 of a chat, and a shift by the numbers of tokens and steps."""
    pipe = klein(distilled)
    pipe.save_pretrained(tmp_path / "pipe")
    model = diffjax.from_pretrained(tmp_path / "pipe", image_size=(HEIGHT, COLUMNS))
    how: dict[str, Any] = {"seed": 3, "num_steps": NUM_STEPS}
    scale = 1.0 if distilled else 4.0
    if not distilled:
        how |= {"guidance_scale": scale, "negative": ""}
    found = model.sample(PROMPT, **how)
    check(found, picture_of(pipe, 512, prompt=PROMPT, guidance_scale=scale))
    assert np.abs(model.sample("a green pear", **how) - found).max() > 20 / 255


@pytest.mark.parity
def test_dev_by_states_in_a_file_is_that_of_diffusers(tmp_path, capsys):
    """Its text encoder has 24 billion parameters, and its folder need not be there."""
    import torch
    from safetensors.torch import save_file

    pipe = klein(guidance=True, kind="Flux2Pipeline", text_encoder=None, tokenizer=None)
    pipe.save_pretrained(tmp_path / "pipe")
    states = torch.randn((1, 512, 3 * WIDTH), generator=torch.Generator().manual_seed(5))
    save_file({"prompt_embeds": states.contiguous()}, tmp_path / "states.safetensors")
    out = tmp_path / "apple.png"
    flags = [f"--pretrained={tmp_path / 'pipe'}", f"--image_size={HEIGHT},{COLUMNS}"]
    flags += [f"--num_steps={NUM_STEPS}", "--seed=3", f"--out={out}"]
    flags += ["--network=embedded_guidance=2.5"]

    def run(*more):
        return cli.run(sample.main, sample.FLAGS, usage=sample.USAGE, argv=[*flags, *more])

    assert run(f"--states={tmp_path / 'states.safetensors'}") == 0
    with np.load(out.with_suffix(".npz")) as arrays:
        found = arrays["images"]
    check(found, picture_of(pipe, 512, prompt_embeds=states, guidance_scale=2.5))
    save_file({"prompt_embeds": states[:, :9].contiguous()}, tmp_path / "short.safetensors")
    save_file({"embeds": states}, tmp_path / "other.safetensors")
    capsys.readouterr()  # what diffusers has printed
    for more, said in (
        (["--states=no.safetensors"], "no.safetensors"),
        ([f"--states={tmp_path / 'other.safetensors'}"], "has no prompt_embeds, but embeds"),
        ([f"--states={tmp_path / 'short.safetensors'}"], "an array of shape (1, 512, 72)"),
        (["--states=x", f"--prompts={PROMPT}"], "--states has all conditions"),
    ):
        assert run(*more) == 2
        error = capsys.readouterr().err
        assert said in error_line(error)


@pytest.mark.parity
def test_a_text_encoder_that_is_not_known_is_refused(tmp_path):
    """With what to do in its place."""
    import json

    klein().save_pretrained(tmp_path / "pipe")
    index = tmp_path / "pipe" / "model_index.json"
    entries = json.loads(index.read_text())
    entries["text_encoder"] = ["transformers", "Mistral3ForConditionalGeneration"]
    index.write_text(json.dumps(entries))
    with pytest.raises(UserError, match="Mistral3ForConditionalGeneration, a text encoder that"):
        diffjax.from_pretrained(tmp_path / "pipe")
    assert diffjax.from_pretrained(tmp_path / "pipe", texts=False).family == "Flux.2 of diffusers"
