"""Pipelines of diffusers: the whole picture, from folders that it saved and that it loads."""

import shutil
from itertools import product
from typing import Any

import numpy as np
import pytest
from PIL import Image

import diffjax
from diffjax.errors import UserError
from diffjax.exchange.convert import convert
from diffjax.host.run_files import read_json
from diffjax.runs.samples import edits
from diffjax.runs.samples.model import Request
from diffjax.runs.samples.recipes import Chosen, named_recipe
from experiments import edit, evaluate, sample
from experiments.flags import cli
from tests.exchange.test_schedulers import PNDM, SD, SD1, TRAILING, ZERO
from tests.support.messages import error_line
from tests.support.tiny_clip import write_tiny_clip
from tests.support.vocabularies import PIECES
from tests.support.witnesses import witnesses

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


def autoencoder_of(diffusers, scale=0.18215, channels=4, **settings):
    return redrawn(
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32,) * 4,
            layers_per_block=1,
            latent_channels=channels,
            scaling_factor=scale,
            **settings,
        ),
        3,
    )


def stable_diffusion(scheduler, entries, **network):
    _, diffusers, transformers = needed()
    tokenizer = tokenizer_of(transformers)
    return diffusers.StableDiffusionPipeline(
        unet=unet_of(diffusers, cross_attention_dim=24, **network),
        text_encoder=text_encoder_of(transformers, tokenizer, 24),
        tokenizer=tokenizer,
        vae=autoencoder_of(diffusers),
        scheduler=getattr(diffusers, scheduler)(**entries),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(scheduler, entries, **network):
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
        **network,
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


def t5_of(transformers, width=24):
    """A tokenizer of few pieces, and an encoder of two blocks."""
    tokenizer = transformers.T5Tokenizer(vocab=list(PIECES), extra_ids=0, model_max_length=512)
    config = transformers.T5Config(
        vocab_size=len(PIECES),
        d_model=width,
        d_kv=4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return tokenizer, redrawn(transformers.T5EncoderModel(config), 5)


HEADS = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}


def stable_diffusion_3(scheduler, entries):
    _, diffusers, transformers = needed()
    first, second = tokenizer_of(transformers), tokenizer_of(transformers, padding="!")
    third, t5 = t5_of(transformers, 64)
    network = diffusers.SD3Transformer2DModel(
        **HEADS,
        sample_size=SIDE // 8,
        in_channels=16,
        out_channels=16,
        joint_attention_dim=64,
        caption_projection_dim=24,
        pooled_projection_dim=24 + 32,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=redrawn(network, 2),
        text_encoder=text_encoder_of(transformers, first, 24, projects=True),
        text_encoder_2=text_encoder_of(transformers, second, 32, projects=True, seed=4),
        text_encoder_3=t5,
        tokenizer=first,
        tokenizer_2=second,
        tokenizer_3=third,
        vae=autoencoder_of(diffusers, 1.5305, 16, shift_factor=0.0609),
        scheduler=getattr(diffusers, scheduler)(**entries),
    )


def flux(scheduler, entries, **network):
    """Dev with a dynamic shift, and else Schnell."""
    _, diffusers, transformers = needed()
    first, (second, t5) = tokenizer_of(transformers), t5_of(transformers)
    sizes = {
        **HEADS,
        "num_single_layers": 2,
        "in_channels": 64,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 24,
        "guidance_embeds": bool(entries.get("use_dynamic_shifting")),
        "axes_dims_rope": (2, 4, 6),
    }
    return diffusers.FluxPipeline(
        transformer=redrawn(diffusers.FluxTransformer2DModel(**sizes | network), 2),
        text_encoder=text_encoder_of(transformers, first, 24),
        text_encoder_2=t5,
        tokenizer=first,
        tokenizer_2=second,
        vae=autoencoder_of(diffusers, 0.3611, 16, shift_factor=0.1159),
        scheduler=getattr(diffusers, scheduler)(**entries),
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


FLOW = "FlowMatchEulerDiscreteScheduler"
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
FLOWS: dict[str, tuple[Any, dict[str, Any], int, dict[str, float]]] = {
    "SD 3.5": (stable_diffusion_3, {"shift": 3.0}, 333 - LENGTH, {"guidance_scale": 4.0}),
    "Flux.1 Dev": (flux, DYNAMIC, 512, {"guidance_scale": 3.5}),
    "Flux.1 Schnell": (flux, {"shift": 1.0}, 256, {"guidance_scale": 0.0}),
}
"""The maker, the scheduler, T5's number of tokens, and scales as diffusers calls them."""


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


# Their schedulers are compared in test_schedulers.py, walk by walk.


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "negative"),
    witnesses(product(CASES, (None, NEGATIVE)), [("SD, DDIM", NEGATIVE), ("SDXL, Euler", None)]),
)
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


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "negative"),
    witnesses(product(FLOWS, (None, NEGATIVE)), [("SD 3.5", NEGATIVE), ("Flux.1 Dev", None)]),
)
def test_the_whole_picture_of_a_flow_is_that_of_diffusers(name, negative, tmp_path):
    """The picture is not square. Guidance of Flux is embedded, and true with a negative prompt."""
    import torch

    make, entries, length, scales = FLOWS[name]
    pipe = make(FLOW, entries)
    pipe.save_pretrained(tmp_path / "pipe")
    height, width = SIDE, 96
    noise = Request(np.zeros(1), seed=3).noise((height // 8, width // 8, 16))
    latents = torch.tensor(np.array(noise).transpose(0, 3, 1, 2))
    how: dict[str, Any] = {"seed": 3, "num_steps": NUM_STEPS}
    if make is flux:
        latents = pipe._pack_latents(latents, 1, 16, height // 8, width // 8)
        scales = {**scales, "true_cfg_scale": 4.0}
    if make is stable_diffusion_3 or negative:
        how["guidance_scale"] = 4.0
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        PROMPT,
        negative_prompt=negative,
        latents=latents,
        num_inference_steps=NUM_STEPS,
        max_sequence_length=length,
        output_type="np",
        height=height,
        width=width,
        **scales,
    ).images
    model = diffjax.from_pretrained(tmp_path / "pipe", image_size=(height, width))
    found = model.sample(PROMPT, negative=negative, **how)
    assert 0.1 < expected.std() < 0.45
    assert np.abs(found - (2 * expected - 1)).max() < 2 / 255  # of a range of 2
    other = model.sample("a green pear", negative=negative, **how)
    assert np.abs(found - other).max() > 20 / 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline that diffusers saved."""
    place = tmp_path_factory.mktemp("pipelines") / "pipe"
    stable_diffusion("DDIMScheduler", SD1).save_pretrained(place)
    return place


@pytest.mark.parity
def test_a_seamless_picture_is_that_of_diffusers_with_circular_convolutions(folder):
    """As users of diffusers set them by hand, in the U-Net and in the autoencoder."""
    torch, diffusers, _ = needed()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for part in (pipe.unet, pipe.vae):
        for layer in part.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.padding_mode = "circular"
                layer._reversed_padding_repeated_twice = [
                    n for n in reversed(layer.padding) for _ in range(2)
                ]
    noise = Request(np.zeros(1), seed=3).noise((SIDE // 8, SIDE // 8, 4))
    expected = picture_of(pipe, noise, NEGATIVE, NUM_STEPS)
    model = diffjax.from_pretrained(folder)
    how: dict[str, Any] = {"seed": 3, "num_steps": NUM_STEPS, "guidance_scale": 4.0}
    found = model.sample(PROMPT, negative=NEGATIVE, seamless=True, **how)
    assert np.abs(found - expected).max() < 2 / 255
    assert np.abs(model.sample(PROMPT, negative=NEGATIVE, **how) - expected).max() > 20 / 255


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
def test_an_edited_image_is_that_of_diffusers(folder, monkeypatch):
    """The same latents and noise, of which 3 of 5 steps are left."""
    torch, diffusers, _ = needed()
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as theirs

    model = diffjax.from_pretrained(folder, image_size=(64, 96))
    condition = model.parts.wired.condition
    photo = np.random.default_rng(0).uniform(-1, 1, (1, 64, 96, 3)).astype(np.float32)
    chosen = Chosen(num_steps=NUM_STEPS, guidance_scale=4.0, against=f"prompt:{NEGATIVE}")
    recipe = named_recipe(model, chosen).recipe
    request = Request(condition.parse([PROMPT]), seed=3)
    latents = model.model().encoded(photo)
    edited = edits.Edit(model.model(), recipe, request, latents)
    found = edited.model.decoded(np.asarray(edits.vary(edits.How(strength=0.6), edited)[1]))

    def noise(shape, **_):
        return torch.tensor(np.array(request.noise(latents.shape[1:])).transpose(0, 3, 1, 2))

    monkeypatch.setattr(theirs, "randn_tensor", noise)
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        given = pipe.vae.encode(torch.tensor(photo.transpose(0, 3, 1, 2))).latent_dist.mode()
    expected = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        image=pipe.vae.config.scaling_factor * given,
        strength=0.6,
        num_inference_steps=NUM_STEPS,
        guidance_scale=4.0,
        output_type="np",
    ).images
    assert 0.1 < expected.std() < 0.45
    assert np.abs(found - (2 * expected - 1)).max() < 2 / 255  # of a range of 2


@pytest.mark.parity
def test_a_photo_is_edited_on_the_command_line(folder, tmp_path, capsys):
    photo, mask, out = (tmp_path / name for name in ("photo.png", "mask.png", "out.png"))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    white = np.zeros((64, 96), np.uint8)
    white[:, 50:] = 255  # which cuts through cells of 8 pixels
    Image.fromarray(pixels).save(photo)
    Image.fromarray(white).save(mask)
    flags = [f"--pretrained={folder}", "--image_size=64,96", "--num_steps=2", f"--out={out}"]
    flags += [f"--input={photo}", f"--prompts={PROMPT}", "--guidance_scale=3"]
    flags += ["--against=prompt:blurry"]
    small, clear, black = (tmp_path / f"{name}.png" for name in ("small", "clear", "black"))
    Image.fromarray(pixels[:32, :48]).save(small)
    Image.fromarray(np.pad(pixels, ((0, 0), (0, 0), (0, 1)))).save(clear)
    Image.fromarray(0 * white).save(black)
    assert run(edit, *flags, "--task=outpaint", f"--input={small}") == 0
    with Image.open(out) as file:
        assert file.size == (96, 64)
    for more, said in (
        ([f"--mask={mask}"], "goes with --task=inpaint, not vary"),
        (["--input=phot.png"], "there is no image file phot.png"),
        ([f"--input={clear}"], "clear.png has transparent parts (an alpha channel)"),
        (["--task=inpaint", f"--mask={black}"], "black.png is black all over"),
        (["--task=inpaint", f"--mask={small}"], "small.png has 32x48 pixels, and 64x96 are needed"),
        (["--task=inpaint", "--method=fixd_noise"], "did you mean 'fixed_noise'"),
        (["--task=outpaint", "--image_size=32,48"], "outpainting makes a border around images"),
        (["--task=upscale"], "observes pixels"),
        (["--image_size=64"], "photo.png has 64x96 pixels, and 64x64 are needed"),
        (["--image_size=64,x"], "--image_size=64,x is to be height,width in pixels"),
        (["--input="], "--input is missing"),
        (["--network=image_size=64"], "that is no setting of a network"),
    ):
        assert run(edit, *flags, *more) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("error: ") == 1  # beside lines of progress, where the machine is slow


@pytest.mark.parity
@pytest.mark.parametrize("name", witnesses(["SD 3.5", "Flux.1 Dev"], ["SD 3.5"]))
def test_a_flow_that_is_written_here_has_the_same_weights_there(name, tmp_path):
    """With three text encoders and their tokenizers; equal bit by bit."""
    _, diffusers, _ = needed()
    make, entries, *_ = FLOWS[name]
    before = make(FLOW, entries)
    before.save_pretrained(tmp_path / "pipe")
    convert(str(tmp_path / "pipe"), "diffusers", tmp_path / "ours")
    after = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(after) is type(before)
    for part, module in before.components.items():
        if hasattr(module, "state_dict"):
            state = after.components[part].state_dict()
            for tensor, x in module.state_dict().items():
                np.testing.assert_array_equal(state[tensor], x, err_msg=f"{part}: {tensor}")
        elif "tokenizer" in part:
            assert after.components[part](PROMPT).input_ids == module(PROMPT).input_ids


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
    capsys.readouterr()  # What took longer has said so.
    for more, said in (
        ([f"--prompts=@{prompts}"], f"can't read conditions from {prompts}: 'utf-8'"),
        ([f"--prompts={PROMPT}", "--labels=x"], "--prompts and --labels are both given"),
        ([f"--prompts={PROMPT}", "--solver=dpmp_2m"], "did you mean 'dpmpp_2m'"),
    ):
        assert run(sample, *flags, *more) == 2
        error = capsys.readouterr().err
        assert said in error_line(error)


@pytest.mark.parity
@pytest.mark.thorough
def test_pictures_of_prompts_are_compared_with_pictures_and_texts_twice(folder, tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        image = Image.fromarray(rng.integers(0, 256, (80, 70, 3), dtype=np.uint8))
        image.save(tmp_path / "pictures" / f"{i}.png")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\nthe moon\n")
    results, clip = tmp_path / "results", write_tiny_clip(tmp_path / "clip")
    flags = [f"--pretrained={folder}", f"--workdir={results}", "--num_samples=4"]
    flags += [f"--data_path={tmp_path / 'pictures'}", "--solvers=ddim", "--num_steps=2"]
    assert run(evaluate, *flags) == 2
    assert "pictures has no text_states, the condition of this model" in capsys.readouterr().err
    flags += [f"--prompts=@{prompts}", "--extractor=pixels,clip_folder"]
    flags += [f"--extractor_weights=,{clip}"]
    found = []
    for _ in range(2):  # into the folder that the first time has made
        assert run(evaluate, *flags) == 0
        found.append(read_json(results / "evaluation.json") or {})
    assert found[0]["clip_score"] == found[1]["clip_score"]
    assert found[0]["clip_score"]["provenance"]["num_texts"] == 2
    assert found[0]["frechet_distance"]["provenance"]["codec"] == "none"  # of the real pictures
    assert found[0]["retrieval_accuracy"]["value"] in (0.0, 0.25, 0.5, 0.75, 1.0)
