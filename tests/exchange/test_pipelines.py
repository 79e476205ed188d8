"""Pipelines of diffusers: the whole picture, from folders that it saved and that it loads."""

import shutil
from typing import Any

import numpy as np
import pytest

import diffjax
from diffjax.errors import UserError
from diffjax.exchange.convert import convert
from diffjax.runs.model import Request
from experiments import cli, sample
from tests.exchange.test_schedulers import PNDM, SD, SD1, TRAILING, ZERO

PROMPT, NEGATIVE = "a red apple, on a wooden table", "blurry"
SIDE, LENGTH = 64, 32
NUM_STEPS = 5
"""It divides 1,000: diffusers' DDIM steps off its grid `trailing` for other numbers."""


def run(script, *arguments):
    return cli.run(script.main, script.FLAGS, usage=script.USAGE, argv=arguments)


def needed():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[parity]'")
    return torch, diffusers, transformers


def redrawn(module, seed):
    """A module of torch with other parameters; scales of norms are near 1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, x in module.named_parameters():
        scale = x[0].numel() ** -0.5 if x.ndim > 1 else 0.2
        drawn = scale * torch.randn(x.shape, generator=generator)
        x.data = drawn + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return module.eval()


def tokenizer_of(transformers, padding="<|endoftext|>"):
    """A byte-level vocabulary with a few pairs, as CLIP's."""
    letters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
    words = [*letters, *(f"{x}</w>" for x in letters), "ap", "app", "re", "red</w>"]
    vocabulary = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    merges = [("a", "p"), ("ap", "p"), ("r", "e"), ("re", "d</w>")]
    return transformers.CLIPTokenizer(
        vocab=vocabulary, merges=merges, pad_token=padding, model_max_length=LENGTH
    )


def text_encoder_of(transformers, tokenizer, width, projects=False, seed=1):
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=width,
        hidden_act="gelu" if projects else "quick_gelu",
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = "CLIPTextModelWithProjection" if projects else "CLIPTextModel"
    return redrawn(getattr(transformers, kind)(config), seed)


def unet_of(diffusers, **settings):
    return redrawn(
        diffusers.UNet2DConditionModel(
            sample_size=SIDE // 8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4,
            **settings,
        ),
        2,
    )


def autoencoder_of(diffusers, scale=0.18215):
    return redrawn(
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32,) * 4,
            layers_per_block=1,
            latent_channels=4,
            scaling_factor=scale,
        ),
        3,
    )


def stable_diffusion(scheduler, entries):
    _, diffusers, transformers = needed()
    tokenizer = tokenizer_of(transformers)
    return diffusers.StableDiffusionPipeline(
        unet=unet_of(diffusers, cross_attention_dim=24),
        text_encoder=text_encoder_of(transformers, tokenizer, 24),
        tokenizer=tokenizer,
        vae=autoencoder_of(diffusers),
        scheduler=getattr(diffusers, scheduler)(**entries),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(scheduler, entries):
    _, diffusers, transformers = needed()
    first, second = tokenizer_of(transformers), tokenizer_of(transformers, padding="!")
    unet = unet_of(
        diffusers,
        cross_attention_dim=24 + 32,
        use_linear_projection=True,
        transformer_layers_per_block=(2, 1),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    return diffusers.StableDiffusionXLPipeline(
        unet=unet,
        text_encoder=text_encoder_of(transformers, first, 24),
        text_encoder_2=text_encoder_of(transformers, second, 32, projects=True, seed=4),
        tokenizer=first,
        tokenizer_2=second,
        vae=autoencoder_of(diffusers, 0.13025),
        scheduler=getattr(diffusers, scheduler)(**entries),
        add_watermarker=False,
    )


LEADING = {**SD, "timestep_spacing": "leading", "steps_offset": 1}
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "SD, DDIM": (stable_diffusion, "DDIMScheduler", SD1),
    "SD, PNDM": (stable_diffusion, "PNDMScheduler", PNDM),
    "SD, Euler": (stable_diffusion, "EulerDiscreteScheduler", LEADING),
    "SD, DPM-Solver++": (stable_diffusion, "DPMSolverMultistepScheduler", LEADING),
    "SD, v of zero SNR": (stable_diffusion, "DDIMScheduler", {**SD1, **ZERO, **TRAILING}),
    "SDXL, Euler": (sdxl, "EulerDiscreteScheduler", LEADING),
}


def picture_of(pipe, noise, negative, num_steps):
    import torch

    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        PROMPT,
        negative_prompt=negative,
        latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
        num_inference_steps=num_steps,
        guidance_scale=4.0,
        output_type="np",
        height=SIDE,
        width=SIDE,
    ).images
    return 2 * images - 1


@pytest.mark.parity
@pytest.mark.parametrize("negative", [None, NEGATIVE], ids=["null", "negative"])
@pytest.mark.parametrize("name", CASES)
def test_the_whole_picture_is_that_of_diffusers(name, negative, tmp_path):
    """Same prompt, noise, scheduler and guidance: within 1/255 at every pixel."""
    make, scheduler, entries = CASES[name]
    pipe = make(scheduler, entries)
    pipe.save_pretrained(tmp_path / "pipe")
    model = diffjax.from_pretrained(tmp_path / "pipe")
    noise = Request(np.zeros(1), seed=3).noise((SIDE // 8, SIDE // 8, 4))
    how: dict[str, Any] = {"seed": 3, "num_steps": NUM_STEPS, "guidance_scale": 4.0}
    expected = picture_of(pipe, noise, negative, NUM_STEPS)
    found = model.sample(PROMPT, negative=negative, **how)
    assert 0.1 < expected.std() < 0.95
    assert np.abs(found - expected).max() < 2 / 255  # of a range of 2
    other = model.sample("a green pear", negative=negative, **how)
    assert np.abs(other - expected).max() > 20 / 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline that diffusers saved."""
    place = tmp_path_factory.mktemp("pipelines") / "pipe"
    stable_diffusion("DDIMScheduler", SD1).save_pretrained(place)
    return place


@pytest.mark.parity
def test_a_folder_that_is_written_here_loads_in_diffusers_and_draws_the_same(folder, tmp_path):
    _, diffusers, _ = needed()
    lines = convert(str(folder), "diffusers", tmp_path / "ours")
    assert "tokenizer: copied" in lines
    before = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    after = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "ours", safety_checker=None
    )
    noise = Request(np.zeros(1), seed=3).noise((SIDE // 8, SIDE // 8, 4))
    pictures = [picture_of(pipe, noise, NEGATIVE, 2) for pipe in (before, after)]
    np.testing.assert_array_equal(*pictures)


@pytest.mark.parity
def test_samples_of_another_size_by_another_solver(folder):
    model = diffjax.from_pretrained(folder, image_size=(64, 96))
    how: dict[str, Any] = {"num_steps": 3, "guidance_scale": 7.0}
    images = model.sample([PROMPT, "blue"], negative=NEGATIVE, solver="dpmpp_2m", **how)
    assert images.shape == (2, 64, 96, 3)
    assert images.std() > 0.1
    for change, said in (
        ({"image_size": 60}, "multiples of 8"),
        ({"image_size": (64, 64, 3)}, "is to be height and width"),
    ):
        with pytest.raises(UserError, match=said):
            diffjax.from_pretrained(folder, **change)
    with pytest.raises(UserError, match="both what guidance leads away from"):
        model.sample(PROMPT, negative="x", against="null")


@pytest.mark.parity
def test_half_a_pipeline_is_refused_in_one_line(folder, tmp_path):
    for name, said in (
        ("vae", "is half a pipeline: the folder vae is missing"),
        ("text_encoder", "the folder text_encoder is missing"),
        ("tokenizer", "the folder tokenizer is missing"),
        ("scheduler", "the folder scheduler is missing"),
        ("unet", "without a folder transformer or unet"),
        ("tokenizer/tokenizer.json", "has no tokenizer"),
        ("scheduler/scheduler_config.json", "there is no such file"),
    ):
        half = tmp_path / name.replace("/", "_")
        shutil.copytree(folder, half)
        part = half / name
        shutil.rmtree(part) if part.is_dir() else part.unlink()
        with pytest.raises(UserError, match=said) as caught:
            diffjax.from_pretrained(half)
        assert "\n" not in str(caught.value)


@pytest.mark.parity
def test_prompts_on_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "apple.png"
    flags = [f"--pretrained={folder}", "--num_steps=2", "--guidance_scale=3", f"--out={out}"]
    assert run(sample, *flags, f"--prompts={PROMPT}", "--against=prompt:blurry") == 0
    with np.load(out.with_suffix(".npz")) as arrays:
        assert arrays["images"].shape == (1, 64, 64, 3)
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("a caf\u00e9\n".encode("latin-1"))
    for more, said in (
        ([f"--prompts=@{prompts}"], f"can't read conditions from {prompts}: 'utf-8'"),
        ([f"--prompts={PROMPT}", "--labels=x"], "--prompts and --labels are both given"),
        ([f"--prompts={PROMPT}", "--solver=dpmp_2m"], "did you mean 'dpmpp_2m'"),
    ):
        assert run(sample, *flags, *more) == 2
        error = capsys.readouterr().err
        assert said in error
        assert len(error.strip().splitlines()) == 1
