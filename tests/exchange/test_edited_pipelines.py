"""Image-to-image and inpainting of pipelines of diffusers: the whole picture is the same."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import diffjax
from diffjax.errors import UserError
from diffjax.runs.samples import edits
from diffjax.runs.samples.condition_files import read
from diffjax.runs.samples.experts import divided
from diffjax.runs.samples.model import Request
from diffjax.runs.samples.recipes import Chosen, named_recipe
from diffjax.sampling.guidance import OtherCondition, SkipLayers
from experiments import sample
from experiments.flags import cli
from tests.exchange.test_pipelines import (
    DYNAMIC,
    FLOW,
    LEADING,
    LENGTH,
    NEGATIVE,
    NUM_STEPS,
    PROMPT,
    SD1,
    autoencoder_of,
    flux,
    needed,
    sdxl,
    stable_diffusion,
    stable_diffusion_3,
    text_encoder_of,
    tokenizer_of,
    unet_of,
)

HEIGHT, WIDTH = 64, 96
SD3 = stable_diffusion_3, FLOW, {"shift": 3.0}
DEV = flux, FLOW, DYNAMIC
MAKERS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "SD": (stable_diffusion, "DDIMScheduler", SD1),
    "SD, DPM-Solver++": (stable_diffusion, "DPMSolverMultistepScheduler", LEADING),
    "SDXL": (sdxl, "EulerDiscreteScheduler", LEADING),
    "SD 3.5": SD3,
    "Flux.1 Dev": DEV,
}
SCALES: dict[str, dict[str, Any]] = {
    "SD 3.5": {"guidance_scale": 4.0, "max_sequence_length": 333 - LENGTH},
    "Flux.1 Dev": {"guidance_scale": 3.5, "true_cfg_scale": 4.0},
    "Flux.1 Fill": {"guidance_scale": 30.0},
}
"""The arguments of diffusers; else the scale is 4."""


class Edited:
    """A folder that diffusers saved, a photo and a mask, for both libraries."""

    def __init__(self, folder, monkeypatch, masked):
        _, diffusers, _ = needed()
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Posterior

        # Latents of the given image are drawn there, and are the mean here.
        monkeypatch.setattr(Posterior, "sample", lambda self, generator=None: self.mode())
        self.folder, self.monkeypatch, self.diffusers = folder, monkeypatch, diffusers
        rng = np.random.default_rng(0)
        self.photo = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        self.mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        self.mask[13:50, 20:77] = 255  # which cuts through cells of 8 pixels
        self.flags = {"input": [folder.parent / "photo.png"], "prompts": PROMPT}
        Image.fromarray(self.photo).save(self.flags["input"][0])
        self.flags["mask"] = folder.parent / "mask.png" if masked else None
        if masked:
            Image.fromarray(self.mask).save(self.flags["mask"])

    def ours(self, task, scale=4.0, negative=NEGATIVE, **flags):
        """The picture, and what began it."""
        run = diffjax.from_pretrained(self.folder, image_size=(HEIGHT, WIDTH))
        how = {"guidance_scale": scale, "against": f"prompt:{negative}"} if negative else {}
        recipe = named_recipe(run, Chosen(num_steps=NUM_STEPS, **how)).recipe
        given = {"task": task, "method": None, "strength": None, "pretrained": self.folder}
        args = SimpleNamespace(**{**given, **self.flags, **flags})
        model = run.model()
        condition = read(edits.unmasked(run.parts.wired.condition), [args.prompts])
        pixels = edits.images_in(model, args.input, task)
        originals = edits.Originals(pixels, condition, edits.mask_in(model, args.mask))
        images, condition, anew = edits.begun_with(model, originals, task)
        request = Request(condition, 3)
        edited = edits.Edit(model, recipe, request, jnp.asarray(images), anew, own=False)
        self.noise = np.array(edited.noise).transpose(0, 3, 1, 2)
        how = edits.How(task, args.strength, args.method)
        return model.decoded(np.asarray(edits.TASKS[task](how, edited)[1]))

    def theirs(self, pipeline, negative=NEGATIVE, masked=True, **how):
        import sys

        import torch

        kind = getattr(self.diffusers, pipeline)
        module = sys.modules[kind.__module__]
        noise = torch.tensor(self.noise)
        self.monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
        more = {"safety_checker": None} if pipeline.startswith("StableDiffusionI") else {}
        pipe = kind.from_pretrained(self.folder, **more)
        pipe.set_progress_bar_config(disable=True)
        if pipeline == "StableDiffusion3InpaintPipeline":
            # diffusers 0.42 does not add the shift of the latents there, as its other pipelines do.
            decode, shift = pipe.vae.decode, pipe.vae.config.shift_factor
            pipe.vae.decode = lambda z, **how: decode(z + shift, **how)
        given: dict[str, Any] = {"image": Image.fromarray(self.photo), **how}
        if masked:
            given["mask_image"] = Image.fromarray(self.mask)
        if negative:
            given["negative_prompt"] = negative
        if "Img2Img" not in pipeline or "Flux" in pipeline:
            given |= {"height": HEIGHT, "width": WIDTH}
        found = pipe(PROMPT, num_inference_steps=NUM_STEPS, output_type="np", **given).images
        return 2 * found - 1


def check(found, expected, photo):
    assert 0.1 < expected.std() < 0.95
    assert np.abs(found - expected).max() < 2 / 255  # of a range of 2
    assert np.abs(found - (photo / 127.5 - 1)).max() > 20 / 255


IMG2IMG = {
    "SDXL": "StableDiffusionXLImg2ImgPipeline",
    "SD 3.5": "StableDiffusion3Img2ImgPipeline",
    "Flux.1 Dev": "FluxImg2ImgPipeline",
}
INPAINT = {
    "SD": "StableDiffusionInpaintPipeline",
    "SD, DPM-Solver++": "StableDiffusionInpaintPipeline",
    "SDXL": "StableDiffusionXLInpaintPipeline",
    "SD 3.5": "StableDiffusion3InpaintPipeline",
    "Flux.1 Dev": "FluxInpaintPipeline",
}


@pytest.mark.parity
@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("name", IMG2IMG)
def test_image_to_image_is_that_of_diffusers(name, tmp_path, monkeypatch):
    make, scheduler, entries = MAKERS[name]
    make(scheduler, entries).save_pretrained(tmp_path / "pipe")
    edited = Edited(tmp_path / "pipe", monkeypatch, masked=False)
    found = edited.ours("vary", strength=0.6)
    how = SCALES.get(name, {"guidance_scale": 4.0})
    check(found, edited.theirs(IMG2IMG[name], masked=False, strength=0.6, **how), edited.photo)


@pytest.mark.parity
@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("name", INPAINT)
def test_inpainting_by_an_ordinary_network_is_that_of_diffusers(name, tmp_path, monkeypatch):
    """What is known has the same noise in each step."""
    make, scheduler, entries = MAKERS[name]
    make(scheduler, entries).save_pretrained(tmp_path / "pipe")
    edited = Edited(tmp_path / "pipe", monkeypatch, masked=True)
    how = SCALES.get(name, {"guidance_scale": 4.0})
    for strength in (1.0, 0.6):
        found = edited.ours("inpaint", strength=strength)
        expected = edited.theirs(INPAINT[name], strength=strength, **how)
        check(found, expected, edited.photo)


@pytest.mark.parity
@pytest.mark.parametrize(
    "name", ["SD", pytest.param("SDXL", marks=pytest.mark.thorough(tenth=False))]
)
def test_inpainting_by_its_own_network_is_that_of_diffusers(name, tmp_path, monkeypatch):
    """Nine channels: latents, mask, and latents of the image without its part."""
    make, scheduler, entries = MAKERS[name]
    make(scheduler, entries, in_channels=9).save_pretrained(tmp_path / "pipe")
    edited = Edited(tmp_path / "pipe", monkeypatch, masked=True)
    expected_of = {"strength": 1.0, "guidance_scale": 4.0}
    found = edited.ours("inpaint")
    check(found, edited.theirs(INPAINT[name], **expected_of), edited.photo)


@pytest.mark.parity
@pytest.mark.thorough(tenth=False)
def test_flux_fill_is_that_of_diffusers(tmp_path, monkeypatch):
    """384 channels of patches: latents, those of the masked image, and its mask of 8x8 pixels."""
    flux(FLOW, DYNAMIC, in_channels=384, out_channels=64).save_pretrained(tmp_path / "pipe")
    edited = Edited(tmp_path / "pipe", monkeypatch, masked=True)
    found = edited.ours("inpaint", negative=None)
    expected = edited.theirs("FluxFillPipeline", negative=None, **SCALES["Flux.1 Fill"])
    check(found, expected, edited.photo)


def refiner():
    """The second half of SDXL: one encoder, five numbers."""
    _, diffusers, transformers = needed()
    words = tokenizer_of(transformers, padding="!")
    unet = unet_of(
        diffusers,
        cross_attention_dim=32,
        use_linear_projection=True,
        transformer_layers_per_block=(2, 1),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 5 * 8,
    )
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        unet=unet,
        text_encoder=None,
        text_encoder_2=text_encoder_of(transformers, words, 32, projects=True, seed=6),
        tokenizer=None,
        tokenizer_2=words,
        vae=autoencoder_of(diffusers, 0.13025),
        scheduler=diffusers.EulerDiscreteScheduler(**LEADING),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


@pytest.mark.parity
@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("negative", [None, NEGATIVE], ids=["null", "negative"])
def test_a_picture_by_sdxl_and_its_refiner_is_that_of_diffusers(negative, tmp_path):
    """On one grid: three steps by the one, two by the other, whose negative score is 2.5."""
    import torch

    base, fine = sdxl("EulerDiscreteScheduler", LEADING), refiner()
    for name, pipe in (("base", base), ("refiner", fine)):
        pipe.save_pretrained(tmp_path / name)
        pipe.set_progress_bar_config(disable=True)
    out = tmp_path / "apple.png"
    flags = [f"--pretrained={tmp_path / 'base'}", f"--refiner={tmp_path / 'refiner'}"]
    flags += ["--refiner_share=0.4", "--image_size=64,96", f"--num_steps={NUM_STEPS}", "--seed=3"]
    flags += ["--guidance_scale=4", f"--prompts={PROMPT}", f"--out={out}"]
    flags += [f"--against=prompt:{negative}"] if negative else []
    assert cli.run(sample.main, sample.FLAGS, usage=sample.USAGE, argv=flags) == 0
    noise = Request(np.zeros(1), seed=3).noise((HEIGHT // 8, WIDTH // 8, 4))
    how: dict[str, Any] = {
        "negative_prompt": negative,
        "num_inference_steps": NUM_STEPS,
        "guidance_scale": 4.0,
    }
    latents = base(
        PROMPT,
        latents=torch.tensor(np.array(noise).transpose(0, 3, 1, 2)),
        height=HEIGHT,
        width=WIDTH,
        denoising_end=0.6,
        output_type="latent",
        **how,
    ).images
    expected = fine(PROMPT, image=latents, denoising_start=0.6, output_type="np", **how).images
    with np.load(out.with_suffix(".npz")) as arrays:
        found = arrays["images"]
    assert 0.1 < expected.std() < 0.45
    assert np.abs(found - (2 * expected - 1)).max() < 2 / 255  # of a range of 2


def test_two_models_share_a_grid_or_say_which_is_left_without_a_step():
    times = np.linspace(1.0, 0.0, 6)
    assert [len(part) for part in divided(times, 0.4)] == [4, 3]
    for at, said in ((0.1, "the second"), (1.0, "the first")):
        with pytest.raises(UserError, match=f"none is left to {said}"):
            divided(times, at)


@pytest.mark.parity
@pytest.mark.thorough(tenth=False)
def test_guidance_away_from_skipped_layers_is_that_of_diffusers(tmp_path):
    """Stable Diffusion 3.5, in the second and the third of five steps."""
    import torch

    pipe = stable_diffusion_3(FLOW, {"shift": 3.0})
    pipe.save_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    model = diffjax.from_pretrained(tmp_path / "pipe", image_size=(HEIGHT, WIDTH))
    t = np.asarray(model.recipe.grid(model.parts.wired.path, NUM_STEPS))[1:4]
    between = (t[:-1] + t[1:]) / 2
    ends = {"low": -20.0, "high": float(2 * np.log((1 - between[1]) / between[1]))}
    skip = SkipLayers("block_1", 1.5, **ends, against=OtherCondition(NEGATIVE))
    how: dict[str, Any] = {"seed": 3, "num_steps": NUM_STEPS, "guidance_scale": 4.0}
    found = model.sample(PROMPT, against=skip, **how)
    noise = Request(np.zeros(1), seed=3).noise((HEIGHT // 8, WIDTH // 8, 16))
    expected = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        latents=torch.tensor(np.array(noise).transpose(0, 3, 1, 2)),
        num_inference_steps=NUM_STEPS,
        output_type="np",
        height=HEIGHT,
        width=WIDTH,
        skip_guidance_layers=[1],
        skip_layer_guidance_scale=1.5,
        skip_layer_guidance_start=0.01,
        skip_layer_guidance_stop=0.5,
        **SCALES["SD 3.5"],
    ).images
    assert 0.1 < expected.std() < 0.45
    assert np.abs(found - (2 * expected - 1)).max() < 2 / 255  # of a range of 2
    plain = model.sample(PROMPT, negative=NEGATIVE, **how)
    assert np.abs(found - plain).max() > 4 / 255
    with pytest.raises(UserError, match="no block is called 'block_7'; there are block_0, block_1"):
        model.sample(PROMPT, against=SkipLayers("block_7"), **how)


@pytest.mark.parity
@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("negative", [None, NEGATIVE], ids=["null", "negative"])
def test_stable_diffusion_3_without_t5_is_that_of_diffusers(negative, tmp_path):
    """Its tokens are zeros."""
    import torch

    pipe = stable_diffusion_3(FLOW, {"shift": 3.0})
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    model = diffjax.from_pretrained(tmp_path / "pipe", image_size=(HEIGHT, WIDTH))
    how: dict[str, Any] = {"seed": 3, "num_steps": NUM_STEPS, "guidance_scale": 4.0}
    found = model.sample(PROMPT, negative=negative, **how)
    noise = Request(np.zeros(1), seed=3).noise((HEIGHT // 8, WIDTH // 8, 16))
    expected = pipe(
        PROMPT,
        negative_prompt=negative,
        latents=torch.tensor(np.array(noise).transpose(0, 3, 1, 2)),
        num_inference_steps=NUM_STEPS,
        output_type="np",
        height=HEIGHT,
        width=WIDTH,
        **SCALES["SD 3.5"],
    ).images
    assert 0.1 < expected.std() < 0.45
    assert np.abs(found - (2 * expected - 1)).max() < 2 / 255  # of a range of 2


@pytest.mark.parity
@pytest.mark.thorough(tenth=False)
def test_a_photo_is_inverted_by_a_published_network_the_better_the_more_steps(tmp_path):
    """By DDIM's steps up and down, where predictions are smooth."""
    pipe = stable_diffusion("DDIMScheduler", SD1)
    pipe.unet.conv_out.weight.data *= 0.05
    pipe.save_pretrained(tmp_path / "pipe")
    run = diffjax.from_pretrained(tmp_path / "pipe", image_size=(HEIGHT, WIDTH))
    model, condition = run.model(), run.parts.wired.condition
    photo = np.random.default_rng(0).uniform(-1, 1, (1, HEIGHT, WIDTH, 3)).astype("f")
    images, request = jnp.asarray(model.encoded(photo)), Request(condition.parse([PROMPT]), 3)
    errors = []
    for num_steps in (10, 40):
        recipe = named_recipe(run, Chosen("ddim", num_steps=num_steps, guidance_scale=1.0)).recipe
        noise, again = edits.invert(edits.How("invert"), edits.Edit(model, recipe, request, images))
        errors.append(float(jnp.sqrt(jnp.mean((again - images) ** 2))))
        assert float(jnp.abs(noise - images).mean()) > 0.1
    assert errors[1] < 0.8 * errors[0], errors  # 0.62 of it
    assert errors[1] < 0.1, errors
