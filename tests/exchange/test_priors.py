"""Kandinsky 2's prior and decoder: the whole picture, from folders that diffusers saved."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import diffjax
from diffjax.errors import UserError
from diffjax.exchange.convert import convert
from diffjax.exchange.priors import ImagePrior
from diffjax.process.paths import Pair
from diffjax.runs.samples import edits
from diffjax.runs.samples.model import Request, sample_keys
from diffjax.runs.samples.recipes import Chosen, named_recipe
from diffjax.sampling.sample import sample as walk
from diffjax.sampling.sample import starting_noise
from diffjax.sampling.solvers import normal
from experiments import sample
from tests.exchange.test_pipelines import (
    LENGTH,
    PROMPT,
    SIDE,
    needed,
    redrawn,
    run,
    text_encoder_of,
    tokenizer_of,
)
from tests.exchange.test_schedulers import KANDINSKY, THRESHOLDS
from tests.support.messages import error_line

WIDTH, GIVEN = 24, 28
"""Of embeddings, and the side of the image that CLIP sees."""
NUM_STEPS = 5
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "learned variance": ("DDPMScheduler", KANDINSKY | THRESHOLDS),
    "DDIM": (
        "DDIMScheduler",
        {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False, "steps_offset": 1},
    ),
}


def image_encoder_of(transformers, seed=6):
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=GIVEN,
        patch_size=14,
        projection_dim=WIDTH,
        hidden_act="gelu",
    )
    return redrawn(transformers.CLIPVisionModelWithProjection(config), seed)


def prior_of():
    _, diffusers, transformers = needed()
    tokenizer = tokenizer_of(transformers, padding="!")
    network = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        embedding_dim=WIDTH,
        num_embeddings=LENGTH,
    )
    return diffusers.KandinskyV22PriorPipeline(
        prior=redrawn(network, 5),
        image_encoder=image_encoder_of(transformers),
        text_encoder=text_encoder_of(transformers, tokenizer, WIDTH, projects=True),
        tokenizer=tokenizer,
        scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        image_processor=transformers.CLIPImageProcessor(
            crop_size=GIVEN, size={"shortest_edge": GIVEN}
        ),
    )


def decoder_of(scheduler, entries, **settings):
    _, diffusers, _ = needed()
    network = diffusers.UNet2DConditionModel(
        sample_size=SIDE // 8,
        in_channels=settings.pop("in_channels", 4),
        out_channels=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        attention_head_dim=16,
        cross_attention_dim=WIDTH,
        resnet_time_scale_shift="scale_shift",
        **{
            "addition_embed_type": "image",
            "encoder_hid_dim_type": "image_proj",
            "encoder_hid_dim": WIDTH,
            **settings,
        },
    )
    codec = diffusers.VQModel(
        block_out_channels=(32,) * 4,
        down_block_types=(*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
        latent_channels=4,
        layers_per_block=1,
        num_vq_embeddings=8,
        vq_embed_dim=4,
        norm_type="spatial",
    )
    codec = redrawn(codec, 8)
    codec.decoder.conv_out.weight.data *= 0.1  # else most pixels are black or white
    return {
        "unet": redrawn(network, 7),
        "movq": codec,
        "scheduler": getattr(diffusers, scheduler)(**entries),
    }


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """A prior that diffusers saved, with the pipeline."""
    pipe = prior_of()
    place = tmp_path_factory.mktemp("priors") / "prior"
    pipe.save_pretrained(place)
    # In float32 the last step is off by 5e-4 (test_unclip_rounds_its_last_step).
    pipe.scheduler.betas = pipe.scheduler.betas.double()
    pipe.scheduler.alphas = 1 - pipe.scheduler.betas
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas.cumprod(0)
    pipe.set_progress_bar_config(disable=True)
    return place, pipe


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A decoder that diffusers saved, with the pipeline."""
    return saved(tmp_path_factory.mktemp("decoders") / "decoder", "learned variance")


def saved(place, name):
    _, diffusers, _ = needed()
    pipe = diffusers.KandinskyV22Pipeline(**decoder_of(*SCHEDULERS[name]))
    pipe.save_pretrained(place)
    pipe.set_progress_bar_config(disable=True)
    return place, pipe


class Noise:
    """The noise of our walks in the place of torch's: of the start, and of each step."""

    def __init__(self, seed, shape, rows=(0,)):
        keys = sample_keys(seed, np.array(rows))
        self.shape, self.count = shape, 0
        start, self.keys = starting_noise(keys, shape)
        self.start = self.as_theirs(start)

    def as_theirs(self, x):
        import torch

        x = torch.tensor(np.array(x))
        return x.reshape(len(x), -1) if self.shape[:2] == (1, 1) else x.permute(0, 3, 1, 2)

    def __call__(self, shape, **_):
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, self.count)
        self.count += 1
        return self.as_theirs(normal(keys, self.shape))


def embeddings_of_diffusers(pipe, prompts, monkeypatch, rows=(0,), num_steps=NUM_STEPS):
    from diffusers.schedulers import scheduling_unclip

    noise = Noise(0, (1, 1, WIDTH), rows)
    monkeypatch.setattr(scheduling_unclip, "randn_tensor", noise)
    found = pipe(
        list(prompts), latents=noise.start, num_inference_steps=num_steps, guidance_scale=4.0
    )
    return found.image_embeds.numpy(), found.negative_image_embeds.numpy()


def picture_of(pipe, embedding, null, monkeypatch, **how):
    import torch
    from diffusers.schedulers import scheduling_ddpm

    noise = Noise(3, (SIDE // 8, SIDE // 8, 4))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", noise)
    images = pipe(
        image_embeds=torch.tensor(embedding),
        negative_image_embeds=torch.tensor(null),
        latents=noise.start.clone(),
        num_inference_steps=NUM_STEPS,
        guidance_scale=4.0,
        height=SIDE,
        width=SIDE,
        output_type="np",
        **how,
    ).images
    return 2 * images - 1


@pytest.mark.parity
def test_embeddings_of_texts_are_those_of_diffusers(prior, monkeypatch):
    """A batch of unlike texts, each with the noise of its number."""
    folder, pipe = prior
    texts = [PROMPT, "blue"]
    expected, null = embeddings_of_diffusers(pipe, texts, monkeypatch, (0, 1))
    model = ImagePrior(diffjax.from_pretrained(folder), Chosen(num_steps=NUM_STEPS))
    assert np.abs(expected[0] - expected[1]).max() > 0.1
    np.testing.assert_allclose(model(texts), expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(model.nothing, null[0], rtol=1e-5, atol=1e-5)
    other = model.run.sample(texts, solver="dpmpp_2m", num_steps=9)
    assert other.shape == (2, 1, 1, WIDTH)
    assert np.isfinite(other).all()


@pytest.mark.parity
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.thorough(tenth=False) if name == "DDIM" else [])
        for name in SCHEDULERS
    ],
)
def test_the_whole_picture_is_that_of_diffusers(name, prior, tmp_path, monkeypatch):
    """Same prompt, noise and guidance, through prior and decoder: within 1/255 at every pixel."""
    folder, prior_pipe = prior
    place, pipe = saved(tmp_path / "decoder", name)
    embedding, null = embeddings_of_diffusers(prior_pipe, [PROMPT], monkeypatch)
    expected = picture_of(pipe, embedding, null, monkeypatch)
    by = ImagePrior(diffjax.from_pretrained(folder), Chosen(num_steps=NUM_STEPS))
    model = diffjax.from_pretrained(place, prior=by)
    how: dict[str, Any] = {"seed": 3, "num_steps": NUM_STEPS, "guidance_scale": 4.0}
    found = model.sample(PROMPT, **how)
    assert 0.05 < expected.std() < 0.95
    assert np.abs(found - expected).max() < 2 / 255  # of a range of 2
    assert np.abs(model.sample("a green pear", **how) - expected).max() > 20 / 255
    # A negative prompt is an embedding too, and embeddings need no text.
    negative = picture_of(pipe, embedding, by(["blurry"]), monkeypatch)
    assert np.abs(model.sample(PROMPT, negative="blurry", **how) - negative).max() < 2 / 255
    np.testing.assert_array_equal(model.sample(by([PROMPT]), **how), found)


def decoder_with_text():
    """Kandinsky 2.1's decoder, of 77 tokens, and its text encoder."""
    _, diffusers, transformers = needed()
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    letters = [(letter, -3.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz,"]
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    pieces += [("\u2581red", -1.0), ("\u2581apple", -1.0), ("<mask>", 0.0)]
    tokenizer = transformers.XLMRobertaTokenizer(vocab=pieces, model_max_length=512)
    config = MCLIPConfig(
        transformerDimSize=32,
        imageDimSize=WIDTH,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=90,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    parts = decoder_of(
        *SCHEDULERS["DDIM"],
        addition_embed_type="text_image",
        encoder_hid_dim_type="text_image_proj",
        encoder_hid_dim=32,
    )
    return diffusers.KandinskyPipeline(
        **parts, tokenizer=tokenizer, text_encoder=redrawn(MultilingualCLIP(config), 9)
    )


@pytest.mark.thorough(tenth=False)
@pytest.mark.parity
@pytest.mark.parametrize("negative", [None, "blurry"], ids=["null", "negative"])
def test_the_picture_of_a_decoder_with_texts_is_that_of_diffusers(negative, prior, tmp_path):
    """Kandinsky 2.1: the text goes to the prior, and beside it to the multilingual encoder."""
    torch, *_ = needed()
    pipe = decoder_with_text()
    pipe.save_pretrained(tmp_path / "decoder")
    pipe.set_progress_bar_config(disable=True)
    by = ImagePrior(diffjax.from_pretrained(prior[0]), Chosen(num_steps=2))
    model = diffjax.from_pretrained(tmp_path / "decoder", prior=by)
    null = by.nothing[None] if negative is None else by([negative])
    expected = pipe(
        PROMPT,
        negative_prompt=negative,
        image_embeds=torch.tensor(by([PROMPT])),
        negative_image_embeds=torch.tensor(null),
        latents=Noise(3, (SIDE // 8, SIDE // 8, 4)).start,
        num_inference_steps=NUM_STEPS,
        guidance_scale=4.0,
        height=SIDE,
        width=SIDE,
        output_type="np",
    ).images
    how: dict[str, Any] = {"seed": 3, "num_steps": NUM_STEPS, "guidance_scale": 4.0}
    found = model.sample(PROMPT, negative=negative, **how)
    assert 0.02 < expected.std() < 0.49
    assert np.abs(found - (2 * expected - 1)).max() < 2 / 255  # of a range of 2
    assert np.abs(model.sample("a cat", negative=negative, **how) - found).max() > 20 / 255


@pytest.mark.thorough(tenth=False)
@pytest.mark.parity
def test_embeddings_of_images_and_mixtures_are_those_of_diffusers(prior, tmp_path, monkeypatch):
    torch, *_ = needed()
    folder, pipe = prior
    by = ImagePrior(diffjax.from_pretrained(folder), Chosen(num_steps=2))
    files = []
    for number, size in enumerate([(40, 56), (33, 28)]):  # width and height
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(files[-1])
    images = [Image.open(file) for file in files]
    pixels = [pipe.image_processor(x, return_tensors="pt").pixel_values for x in images]
    with torch.no_grad():
        expected = [pipe.image_encoder(x).image_embeds[0].numpy() for x in pixels]
    found = by([f"image:{file}" for file in files])
    for one, other in zip(found, expected, strict=True):
        assert np.linalg.norm(one - other) < 1e-3 * np.linalg.norm(other)
    text = by([PROMPT])[0]
    mixed = pipe.interpolate
    noise = Noise(0, (1, 1, WIDTH))
    from diffusers.schedulers import scheduling_unclip

    def again(shape, **how):
        noise.count %= 1  # Each walk of two steps has one step with noise.
        return noise(shape, **how)

    monkeypatch.setattr(scheduling_unclip, "randn_tensor", again)
    theirs = mixed([PROMPT, *images], [0.5, 0.3, 0.2], num_inference_steps=2, latents=noise.start)
    for prompt in (
        f"0.5*{PROMPT} + 0.3*image:{files[0]} + 0.2*image:{files[1]}",
        {PROMPT: 0.5, f"image:{files[0]}": 0.3, f"image:{files[1]}": 0.2},
    ):
        np.testing.assert_allclose(by([prompt])[0], theirs.image_embeds[0], rtol=1e-3, atol=2e-3)
    ours = 0.5 * text + 0.3 * found[0] + 0.2 * found[1]
    np.testing.assert_allclose(by([prompt])[0], ours, atol=1e-5)
    np.testing.assert_allclose(by.nothing, theirs.negative_image_embeds[0], rtol=1e-4, atol=1e-4)


@pytest.mark.thorough(tenth=False)
@pytest.mark.parity
def test_folders_that_are_written_here_load_in_diffusers_and_draw_the_same(
    prior, decoder, tmp_path, monkeypatch
):
    _, diffusers, _ = needed()
    for name, folder in (("prior", prior[0]), ("decoder", decoder[0])):
        lines = convert(str(folder), "diffusers", tmp_path / name)
        assert any(f"{name.replace('decoder', 'movq')}: " in line for line in lines)
    embedded, pictures = [], []
    for folders in ((prior[0], decoder[0]), (tmp_path / "prior", tmp_path / "decoder")):
        pipes = [diffusers.DiffusionPipeline.from_pretrained(folder) for folder in folders]
        for pipe in pipes:
            pipe.set_progress_bar_config(disable=True)
        found = embeddings_of_diffusers(pipes[0], [PROMPT], monkeypatch, num_steps=2)
        embedded.append(found[0])
        pictures.append(picture_of(pipes[1], *found, monkeypatch))
    np.testing.assert_array_equal(*embedded)
    np.testing.assert_array_equal(*pictures)


@pytest.mark.thorough(tenth=False)
@pytest.mark.parity
def test_an_edited_image_is_that_of_diffusers(prior, decoder, monkeypatch):
    """From 3 of 5 steps on, with the same noise."""
    torch, diffusers, _ = needed()

    from diffusers.pipelines.kandinsky2_2 import pipeline_kandinsky2_2_img2img as theirs
    from diffusers.schedulers import scheduling_ddpm

    by = ImagePrior(diffjax.from_pretrained(prior[0]), Chosen(num_steps=2))
    model = diffjax.from_pretrained(decoder[0], prior=by)
    photo = np.random.default_rng(0).uniform(-1, 1, (1, SIDE, SIDE, 3)).astype(np.float32)
    chosen = Chosen(num_steps=NUM_STEPS, guidance_scale=4.0)
    request = Request(model.parts.wired.condition.parse([PROMPT]), seed=3)
    latents = model.model().encoded(photo)
    edited = edits.Edit(model.model(), named_recipe(model, chosen).recipe, request, latents)
    found = edited.model.decoded(np.asarray(edits.vary(edits.How(strength=0.6), edited)[1]))

    noise = Noise(3, (SIDE // 8, SIDE // 8, 4))
    monkeypatch.setattr(theirs, "randn_tensor", lambda shape, **_: noise.start)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", noise)
    pipe = diffusers.KandinskyV22Img2ImgPipeline.from_pretrained(decoder[0])
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        image_embeds=torch.tensor(by([PROMPT])),
        negative_image_embeds=torch.tensor(by.nothing[None]),
        image=torch.tensor(photo.transpose(0, 3, 1, 2)),
        strength=0.6,
        num_inference_steps=NUM_STEPS,
        guidance_scale=4.0,
        height=SIDE,
        width=SIDE,
        output_type="np",
    ).images
    assert 0.02 < expected.std() < 0.49
    assert np.abs(found - (2 * expected - 1)).max() < 2 / 255  # of a range of 2


@pytest.mark.thorough(tenth=False)
@pytest.mark.parity
def test_an_inpainted_picture_is_that_of_diffusers(prior, tmp_path, monkeypatch):
    """The network sees what is kept, and after each step it is put back, with the same noise."""
    torch, diffusers, _ = needed()
    from diffusers.schedulers import scheduling_ddpm

    parts = decoder_of(*SCHEDULERS["learned variance"], in_channels=9)
    pipe = diffusers.KandinskyV22InpaintPipeline(**parts)
    pipe.save_pretrained(tmp_path / "decoder")
    pipe.set_progress_bar_config(disable=True)
    by = ImagePrior(diffjax.from_pretrained(prior[0]), Chosen(num_steps=2))
    model = diffjax.from_pretrained(tmp_path / "decoder", prior=by)
    photo = np.random.default_rng(0).uniform(-1, 1, (1, SIDE, SIDE, 3)).astype(np.float32)
    white = np.zeros((SIDE, SIDE), np.float32)
    white[:, SIDE // 2 :] = 1
    noise = Noise(3, (SIDE // 8, SIDE // 8, 4))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", noise)
    expected = pipe(
        image_embeds=torch.tensor(by([PROMPT])),
        negative_image_embeds=torch.tensor(by.nothing[None]),
        image=torch.tensor(photo.transpose(0, 3, 1, 2)),
        mask_image=torch.tensor(white)[None, None],
        latents=noise.start.clone(),
        num_inference_steps=NUM_STEPS,
        guidance_scale=4.0,
        height=SIDE,
        width=SIDE,
        output_type="np",
    ).images

    kept = np.zeros((1, SIDE // 8, SIDE // 8, 1), np.float32)
    kept[:, :, : SIDE // 16 - 1] = 1  # A cell beside the white part is made anew too.
    latents = model.model().encoded(photo)
    kind: Any = model.parts.wired.condition
    image = kind.parts["image"].joined(latents, white[None, :, :, None])
    np.testing.assert_array_equal(image, np.concatenate([kept * latents, kept], -1))
    condition = kind.of({"text": [PROMPT], "image": image})
    start = np.asarray(noise.start).transpose(0, 2, 3, 1)
    recipe = named_recipe(model, Chosen(num_steps=NUM_STEPS, guidance_scale=4.0)).recipe

    def step(denoise, interval, memory, x):
        x, memory = recipe.solver.step(denoise, interval, memory, x)
        return kept * interval.end.mix(Pair(latents, start)) + (1 - kept) * x, memory

    solver = recipe.solver._replace(step=step)
    times = recipe.times(model.parts.wired.path)
    request = Request(condition, seed=3)
    x = model.model().walk(walk, replace(recipe, solver=solver), request, times)
    found = model.model().decoded(np.asarray(kept * latents + (1 - kept) * x))
    assert 0.02 < expected.std() < 0.49
    assert np.abs(found - (2 * expected - 1)).max() < 2 / 255  # of a range of 2


@pytest.mark.parity
def test_prompts_on_the_command_line_and_messages(prior, decoder, tmp_path, capsys):
    out = tmp_path / "apple.png"
    flags = [f"--pretrained={decoder[0]}", "--num_steps=2", f"--out={out}"]
    by = [f"--prior={prior[0]}"]
    assert run(sample, *flags, *by, f"--prompts={PROMPT}", "--against=prompt:blurry") == 0
    with np.load(out.with_suffix(".npz")) as arrays:
        assert arrays["images"].shape == (1, SIDE, SIDE, 3)
    capsys.readouterr()
    for more, said in (
        ([f"--prompts={PROMPT}"], "needs a prior, which makes the embedding of an image of it"),
        ([f"--prompts={PROMPT}", f"--prior={decoder[0]}"], "is no prior, but a KandinskyUNet"),
        ([f"--prompts={PROMPT}", f"--prior={prior[0]}/prior"], "is a prior alone: name the folder"),
        ([f"--prompts={PROMPT}", "--prior="], "--prior= is empty"),
        ([*by, "--prompts=image:none.png"], "'none.png' is no image file that can be read"),
        ([*by, "--prompts=0.5*image:none.png + 1*x"], "'none.png' is no image file"),
    ):
        assert run(sample, *flags, *more) == 2
        error = capsys.readouterr().err
        assert said in error_line(error)
    with pytest.raises(UserError, match="takes no image embeddings: leave prior= out"):
        diffjax.from_pretrained(prior[0], prior=prior[0])
