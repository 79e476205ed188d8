"""Files of few steps: the whole picture of diffusers, with the noise that is drawn on the way."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax.errors import UserError
from diffjax.exchange.few_steps import few_steps
from diffjax.pretrained.files import write_safetensors
from diffjax.process.precond import Meaning
from diffjax.runs.samples.model import Request, sample_keys
from diffjax.sampling.sample import starting_noise
from diffjax.sampling.solvers import normal
from tests.exchange import test_pipelines as pipelines
from tests.exchange.test_pipelines import FLOW, PROMPT, SIDE, needed
from tests.exchange.test_schedulers import SD, TRAILING
from tests.support.witnesses import witnesses

SHAPE = (SIDE // 8, SIDE // 8, 4)
SEED = 3
LIGHTNING = {**SD, **TRAILING}


def with_our_noise(monkeypatch, scheduler):
    """Makes a scheduler of diffusers draw the noise that ours draws in its steps."""
    import torch

    keys = starting_noise(sample_keys(SEED, jnp.arange(1)), SHAPE)[1]
    steps = iter(range(1000))

    def randn_tensor(*_, **__):
        at = jax.vmap(jax.random.fold_in, (0, None))(keys, next(steps))
        return torch.tensor(np.array(normal(at, SHAPE)).transpose(0, 3, 1, 2))

    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", randn_tensor, raising=False)


def picture_of(pipe, num_steps, guidance_scale=0.0, **how):
    """What diffusers draws, as its model cards do."""
    import torch

    noise = np.array(Request(np.zeros(1), seed=SEED).noise(SHAPE))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        PROMPT,
        latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        output_type="np",
        height=SIDE,
        width=SIDE,
        **how,
    ).images
    return 2 * images - 1


def assert_same(found, expected):
    assert 0.1 < expected.std() < 0.95
    assert np.abs(found - expected).max() < 2 / 255  # of a range of 2


def lcm_of(scheduler, entries):
    """Stable Diffusion with a U-Net that embeds a scale of guidance."""
    _, diffusers, _ = needed()
    pipe = pipelines.stable_diffusion(scheduler, entries)
    unet = pipelines.unet_of(diffusers, cross_attention_dim=24, time_cond_proj_dim=16)
    pipe.register_modules(unet=unet)
    return pipe


FOLDERS: dict[str, tuple[Any, str, dict[str, Any], int, dict[str, Any], dict[str, Any]]] = {
    "sdxl-turbo": (
        pipelines.sdxl, "EulerAncestralDiscreteScheduler", LIGHTNING, 4, {}, {},
    ),
    "sd-turbo": (
        pipelines.stable_diffusion, "EulerDiscreteScheduler", LIGHTNING, 4, {}, {},
    ),
    "LCM": (lcm_of, "LCMScheduler", SD, 4, {"guidance_scale": 8.0}, {}),
    "LCM, another guidance": (
        lcm_of, "LCMScheduler", SD, 4, {"guidance_scale": 2.5}, {"embedded_guidance": 2.5},
    ),
    "TCD": (pipelines.sdxl, "TCDScheduler", SD, 4, {"eta": 0.3}, {}),
}  # fmt: skip
"""The maker, its scheduler, the steps, what diffusers is called with, and `from_pretrained`."""


# A network whose steps draw noise, and one that embeds a scale of guidance. The other schedulers
# are compared in test_schedulers.py, walk by walk.
QUICK_FOLDERS = ("sdxl-turbo", "LCM")


@pytest.mark.parity
@pytest.mark.parametrize("name", witnesses(FOLDERS, QUICK_FOLDERS))
def test_the_whole_picture_of_a_folder_of_few_steps_is_that_of_diffusers(
    name, tmp_path, monkeypatch
):
    """Steps and guidance are those that the folder is sampled with: nothing is said here."""
    make, scheduler, entries, num_steps, theirs, ours = FOLDERS[name]
    pipe = make(scheduler, entries)
    pipe.save_pretrained(tmp_path / name)
    with_our_noise(monkeypatch, pipe.scheduler)
    expected = picture_of(pipe, num_steps, **theirs)
    model = diffjax.from_pretrained(tmp_path / name, **ours)
    assert_same(model.sample(PROMPT, seed=SEED), expected)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """SDXL, as its folder is published."""
    place = tmp_path_factory.mktemp("few") / "sdxl"
    pipelines.sdxl("EulerDiscreteScheduler", pipelines.LEADING).save_pretrained(place)
    return place


FILES: dict[str, tuple[str, dict[str, Any], int]] = {
    "sdxl_lightning_4step_unet.safetensors": ("EulerDiscreteScheduler", TRAILING, 4),
    "sdxl_lightning_1step_unet_x0.safetensors": (
        "EulerDiscreteScheduler", {**TRAILING, "prediction_type": "sample"}, 1,
    ),
    "sdxl_lightning_2step_lora.safetensors": ("EulerDiscreteScheduler", TRAILING, 2),
    "lcm-lora-sdxl.safetensors": ("LCMScheduler", {}, 4),
    "Hyper-SDXL-8steps-lora.safetensors": (
        "DDIMScheduler", {**TRAILING, "clip_sample": False}, 8,
    ),
}  # fmt: skip


# What names say is in test_names_say_how_a_file_is_sampled.
QUICK_FILES = ("sdxl_lightning_1step_unet_x0.safetensors", "lcm-lora-sdxl.safetensors")


@pytest.mark.parity
@pytest.mark.parametrize("name", witnesses(FILES, QUICK_FILES))
def test_the_whole_picture_of_a_file_in_a_folder_is_that_of_diffusers(
    name, base, tmp_path, monkeypatch
):
    """A U-Net, or a LoRA, with the scheduler that its card has; the name says it here."""
    torch, diffusers, _ = needed()
    scheduler, changes, num_steps = FILES[name]
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)
    file = tmp_path / name
    if "unet" in name:
        pipelines.redrawn(pipe.unet, 8)
        state = {key: x.numpy() for key, x in pipe.unet.state_dict().items()}
        write_safetensors(file, state)
        model = diffjax.from_pretrained(base, components={"network": file})
    else:
        generator, state = torch.Generator().manual_seed(8), {}
        for layer, module in pipe.unet.named_modules():
            if layer.endswith(("to_q", "to_out.0")):
                out, inputs = module.weight.shape
                down, up = (torch.randn(x, generator=generator) for x in ((3, inputs), (out, 3)))
                state[f"unet.{layer}.lora_A.weight"] = down.numpy() / inputs**0.5
                state[f"unet.{layer}.lora_B.weight"] = up.numpy() / 3**0.5
        write_safetensors(file, state)
        pipe.load_lora_weights(file)
        model = diffjax.from_pretrained(base, loras={file: 1.0})
    kind = getattr(diffusers, scheduler)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **changes)
    with_our_noise(monkeypatch, pipe.scheduler)
    expected = picture_of(pipe, num_steps)
    assert_same(model.sample(PROMPT, seed=SEED), expected)
    ends = model.parts.wired.objective.traits.meaning is Meaning.END_OF_FLOW
    assert ends == (scheduler == "LCMScheduler")
    assert model.recipe.num_steps == num_steps


@pytest.mark.parity
@pytest.mark.thorough(tenth=False)
def test_stable_diffusion_3_5_turbo_draws_the_picture_of_diffusers(tmp_path):
    import torch

    pipe = pipelines.stable_diffusion_3(FLOW, {"shift": 3.0})
    place = tmp_path / "stable-diffusion-3.5-large-turbo"
    pipe.save_pretrained(place)
    noise = np.array(Request(np.zeros(1), seed=SEED).noise((*SHAPE[:2], 16)))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        PROMPT,
        latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
        num_inference_steps=4,
        guidance_scale=0.0,
        max_sequence_length=333 - pipelines.LENGTH,
        output_type="np",
        height=SIDE,
        width=SIDE,
    ).images
    found = diffjax.from_pretrained(place).sample(PROMPT, seed=SEED)
    assert_same(found, 2 * expected - 1)


@pytest.mark.parity
def test_in_bfloat16_kernels_and_text_encoders_take_half_the_memory(base):
    half = diffjax.from_pretrained(base, dtype="bfloat16")
    for path, leaf in jax.tree_util.tree_leaves_with_path(half.params):
        assert leaf.dtype == (jnp.bfloat16 if path[-1].key == "kernel" else jnp.float32)
    condition: Any = half.parts.wired.condition
    encoder = condition.parts["text"].encoder.encoders[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(encoder.loaded.params)} == {
        jnp.dtype(jnp.bfloat16)
    }


@pytest.mark.parity
@pytest.mark.thorough(tenth=False)
def test_a_picture_in_bfloat16_is_near_that_in_float32(base):
    how = {"seed": SEED, "num_steps": 2, "guidance_scale": 1.0}
    whole, half = (diffjax.from_pretrained(base, dtype=x) for x in ("float32", "bfloat16"))
    near, far = (model.sample(PROMPT, **how) for model in (half, whole))
    assert np.abs(near - far).mean() < 0.1 * far.std()


@pytest.mark.parity
def test_what_does_not_fit_a_folder_of_few_steps_is_one_line(base, tmp_path):
    model = diffjax.from_pretrained(base, components={"scheduler": {"_class_name": "LCMScheduler"}})
    for how, said in (
        ({"guidance_scale": 2.0}, "use guidance_scale=1"),
        ({"solver": "dpmpp_2m"}, "take the solver consistency"),
        ({"num_steps": 51}, "num_steps=51: a walk takes some of the 50 times"),
    ):
        with pytest.raises(UserError, match=said):
            model.sample(PROMPT, **how)
    (tmp_path / "other.safetensors").write_bytes(b"")
    for components, said in (
        ({"unet": "x"}, "has no place for a component 'unet'"),
        ({"network": ""}, "the network '' does not exist"),
        ({"network": tmp_path / "none.safetensors"}, "does not exist: name its path"),
        ({"network": tmp_path / "other.safetensors"}, "other.safetensors"),
        ({"network": base / "vae"}, "vae has a network of .* draws no samples"),
        ({"scheduler": "trailing"}, "is to be entries of its config"),
        ({"scheduler": {"timestep_spacing": "trail"}}, "did you mean 'trailing'"),
        (
            {"scheduler": {"_class_name": "LCMScheduler", "original_inference_steps": 5000}},
            "from 1 to",
        ),
        ({"tokenizer_3": base}, "has no place for a component 'tokenizer_3'"),
        ({"tokenizer": base / "unet"}, "has no tokenizer"),
        (["network"], "is to be names and paths"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            diffjax.from_pretrained(base, components=components)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="this network embeds no scale of guidance"):
        diffjax.from_pretrained(base, embedded_guidance=2.5)


def test_names_say_how_a_file_is_sampled():
    """The last name counts: a file of few steps in a folder of many."""
    for names, num_steps, scheduler in (
        (["sdxl-base", "sdxl_lightning_4step_unet.safetensors"], 4, "EulerDiscreteScheduler"),
        (["sdxl-turbo", "lcm-lora-sdxl.safetensors"], 4, "LCMScheduler"),
        (["sd", "Hyper-SD15-8steps-lora.safetensors"], 8, "DDIMScheduler"),
        (["sd-turbo"], 4, None),
        (["stable-diffusion-3.5-large-turbo"], 4, None),
    ):
        found = few_steps(names)
        assert found is not None
        assert (found.num_steps, found.scheduler.get("_class_name")) == (num_steps, scheduler)
    for name, (scheduler, changes, num_steps) in FILES.items():
        assert few_steps([name]) == (num_steps, {"_class_name": scheduler, **changes})
    assert few_steps(["sdxl-base", "", "turbocharged_style.safetensors"]) is None
