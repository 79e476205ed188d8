"""The training step of a tuned pipeline: loss and gradient are those of diffusers' examples."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.conditions import TokenStates
from diffjax.exchange.pretrained import described
from diffjax.models.families import find_published
from diffjax.runs.initial import find_initial_weights
from diffjax.runs.parts import build_parts
from diffjax.training.sharding import make_mesh
from diffjax.training.state import LIVE
from diffjax.tuning.config import tuning_config
from tests.exchange.test_pipelines import DYNAMIC, FLOW, LEADING, flux, sdxl, stable_diffusion_3
from tests.support.tiny_pipeline import LENGTH, SIDE, WIDTH, write_pipeline

pytest.importorskip("tokenizers", reason="pip install -e '.[text]'")
B = 3


def error(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parity
@pytest.mark.parametrize(
    ("prediction", "arguments"),
    [
        ("epsilon", ""),
        pytest.param("epsilon", "target=v", marks=pytest.mark.thorough),
        pytest.param("v_prediction", "", marks=pytest.mark.thorough),
    ],
)
def test_loss_and_gradient_are_those_of_train_text_to_image(tmp_path, prediction, arguments):
    """Same latents, noise, timesteps and states, of unlike times and latents that are not square.

    `noisy = add_noise(latents, noise, timesteps)`, and the mean squared error to the noise, or to
    `get_velocity` where the scheduler has v prediction.
    """
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")
    folder = write_pipeline(tmp_path / "pipe", prediction_type=prediction)
    config, there = tuning_config(str(folder), arguments), described(folder)
    shape, mesh = (SIDE // 2, SIDE // 2 + 4, 4), make_mesh(devices=jax.devices()[:1])
    parts = build_parts(config.lock(), shape, there.condition, mesh, there.codec)
    like = parts.abstract.weights(LIVE)
    params, _ = find_initial_weights(str(folder), like, denoiser=parts.denoiser)()

    random = np.random.default_rng(0)
    latents = random.normal(size=(B, *shape)).astype(np.float32)
    states = random.normal(size=(B, LENGTH, WIDTH)).astype(np.float32)
    cond = TokenStates(states, np.ones((B, LENGTH), bool), np.zeros((B, WIDTH), np.float32))
    steps = np.array([999, 0, 321])
    objective: Any = parts.wired.objective
    batch = {"image": latents, "cond": cond}
    t = jnp.asarray((steps + 1) / 1000, jnp.float32)

    def ours(params: Any) -> Any:
        noised = objective.noised(t, jax.random.key(0), batch)
        output = objective.evaluate(parts.wired.apply, params, noised)
        return jnp.mean(objective.loss(noised, output)), noised.pair.eps

    (loss, noise), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)

    def tensor(x: Any) -> Any:
        return torch.tensor(np.moveaxis(np.array(x), -1, 1)).double()

    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").double().train()
    kind = "v_prediction" if arguments else prediction
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler", prediction_type=kind)
    x0, eps, at = tensor(latents), tensor(noise), torch.tensor(steps)
    target = scheduler.get_velocity(x0, eps, at) if kind == "v_prediction" else eps
    predicted = unet(scheduler.add_noise(x0, eps, at), at, torch.tensor(states).double()).sample
    expected = torch.nn.functional.mse_loss(predicted, target)
    expected.backward()

    assert abs(float(loss) / expected.item() - 1) < 1e-5
    found = find_published(folder)
    network = parts.denoiser
    theirs = {name: x.grad.numpy() for name, x in unet.named_parameters()}
    mine = found.family.to_theirs(jax.tree.map(np.asarray, gradient), network)
    whole = np.sqrt(sum(np.sum(x**2) for x in theirs.values()))
    assert mine.keys() == theirs.keys()
    for name, x in theirs.items():
        assert np.linalg.norm(mine[name] - x) < 1e-5 * whole, name
    assert error(mine["conv_in.weight"], theirs["conv_in.weight"]) < 1e-4


def tensor(x: Any) -> Any:
    """In PyTorch's layout, in double precision."""
    import torch

    array = np.array(x)
    return torch.tensor(np.moveaxis(array, -1, 1) if array.ndim == 4 else array).double()


def of_sdxl(pipe: Any, x0: Any, eps: Any, t: Any, cond: Any) -> Any:
    """The loss of `train_text_to_image_sdxl.py`, of a network that predicts noise."""
    import torch

    diffusers: Any = importlib.import_module("diffusers")
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    steps = torch.tensor(np.round(1000 * t - 1).astype(np.int64))
    added = {"text_embeds": tensor(cond["text"].pooled), "time_ids": tensor(cond["size"])}
    noisy, states = scheduler.add_noise(x0, eps, steps), tensor(cond["text"].states)
    out = pipe.unet(noisy, steps, states, added_cond_kwargs=added).sample
    return torch.nn.functional.mse_loss(out, eps)


def of_sd3(pipe: Any, x0: Any, eps: Any, t: Any, cond: Any) -> Any:
    """The loss of `train_dreambooth_sd3.py` with `--precondition_outputs=0`."""
    import torch

    time = torch.tensor(t).double()
    sigmas = time[:, None, None, None]
    out = pipe.transformer(
        hidden_states=(1 - sigmas) * x0 + sigmas * eps,
        timestep=1000 * time,
        encoder_hidden_states=tensor(cond.states),
        pooled_projections=tensor(cond.pooled),
    ).sample
    return torch.nn.functional.mse_loss(out, eps - x0)


def of_flux(pipe: Any, x0: Any, eps: Any, t: Any, cond: Any) -> Any:
    """The loss of `train_dreambooth_flux.py`, with its guidance scale of 3.5."""
    import torch

    batch, channels, height, width = x0.shape
    time = torch.tensor(t).double()
    sigmas = time[:, None, None, None]
    noisy = (1 - sigmas) * x0 + sigmas * eps
    out = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, batch, channels, height, width),
        timestep=time,
        guidance=torch.full((batch,), 3.5).double(),
        pooled_projections=tensor(cond.pooled),
        encoder_hidden_states=tensor(cond.states),
        txt_ids=torch.zeros(cond.states.shape[1], 3).double(),
        img_ids=pipe._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", time.dtype),
    ).sample
    out = pipe._unpack_latents(out, 8 * height, 8 * width, 8)
    return torch.nn.functional.mse_loss(out, eps - x0)


SCRIPTS = {
    "SDXL": (sdxl, "EulerDiscreteScheduler", LEADING, of_sdxl),
    "SD 3.5": (stable_diffusion_3, FLOW, {"shift": 3.0}, of_sd3),
    "Flux.1 Dev": (flux, FLOW, DYNAMIC, of_flux),
}


@pytest.mark.parity
@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("name", SCRIPTS)
def test_loss_and_gradient_of_each_family_are_those_of_its_script(name, tmp_path):
    """Same latents, noise, times, states, pooled vectors and sizes, each of them redrawn."""
    make, scheduler, entries, script = SCRIPTS[name]
    pipe, folder = make(scheduler, entries), tmp_path / "pipe"
    pipe.save_pretrained(folder)
    config, there = tuning_config(str(folder)), described(folder)
    (*_, channels), mesh = there.denoiser.image_shape, make_mesh(devices=jax.devices()[:1])
    shape = (8, 12, channels)
    parts = build_parts(config.lock(), shape, there.condition, mesh, there.codec)
    like = parts.abstract.weights(LIVE)
    params, _ = find_initial_weights(str(folder), like, denoiser=parts.denoiser)()
    random = np.random.default_rng(0)

    def drawn(leaf: Any) -> np.ndarray:
        if leaf.dtype == bool:
            return np.ones(leaf.shape, bool)
        return random.normal(size=leaf.shape).astype(np.float32)

    cond = jax.tree.map(drawn, there.condition.example(B))
    batch = {"image": random.normal(size=(B, *shape)).astype(np.float32), "cond": cond}
    t = np.array([1.0, 0.001, 0.322], np.float32)
    objective: Any = parts.wired.objective

    def ours(params: Any) -> Any:
        noised = objective.noised(jnp.asarray(t), jax.random.key(0), batch)
        output = objective.evaluate(parts.wired.apply, params, noised)
        return jnp.mean(objective.loss(noised, output)), noised.pair.eps

    (loss, noise), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    network = (pipe.unet if name == "SDXL" else pipe.transformer).double().train()
    expected = script(pipe, tensor(batch["image"]), tensor(noise), t, cond)
    expected.backward()
    assert abs(float(loss) / expected.item() - 1) < 1e-5
    theirs = {name: x.grad.numpy() for name, x in network.named_parameters() if x.grad is not None}
    found = find_published(folder)
    mine = found.family.to_theirs(jax.tree.map(np.asarray, gradient), parts.denoiser)
    whole = np.sqrt(sum(np.sum(x**2) for x in theirs.values()))
    for name, x in theirs.items():
        assert np.linalg.norm(mine[name] - x) < 1e-5 * whole, name
    rest = [name for name in mine.keys() - theirs.keys() if np.any(mine[name])]
    assert set(rest) <= {"pos_embed.pos_embed"}
