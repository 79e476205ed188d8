"""The training step of a tuned pipeline: loss and gradient are those of diffusers' examples."""

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
