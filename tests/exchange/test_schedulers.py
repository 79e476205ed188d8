"""Schedulers of diffusers as our parts: the walks of both from the same noise."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.exchange.schedulers import dynamic_shift, schedule_of
from diffjax.process.paths import Linear
from diffjax.process.precond import Precond, Unscaled, denoiser
from diffjax.sampling.sample import Recipe, sample, with_condition
from diffjax.sampling.solvers import normal
from diffjax.spec import build
from tests.support.compiling import FAST

SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
SD1 = {**SD, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
PNDM = {**SD, "steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True}
ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
TRAILING = {"timestep_spacing": "trailing"}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "ddim": ("DDIMScheduler", SD1, 10),
    "ddim of any number of steps": ("DDIMScheduler", SD1, 7),
    "ddim to clean data": ("DDIMScheduler", {**SD1, "set_alpha_to_one": True}, 10),
    "ddim of v": ("DDIMScheduler", {**SD1, "prediction_type": "v_prediction"}, 10),
    "ddim of x0": ("DDIMScheduler", {**SD1, "prediction_type": "sample"}, 10),
    "ddim of zero snr": ("DDIMScheduler", {**SD1, **ZERO, **TRAILING}, 10),
    "pndm": ("PNDMScheduler", PNDM, 10),
    "euler": ("EulerDiscreteScheduler", SD, 10),
    "euler leading": (
        "EulerDiscreteScheduler",
        {**SD, "timestep_spacing": "leading", "steps_offset": 1},
        10,
    ),
    "euler trailing": ("EulerDiscreteScheduler", {**SD, **TRAILING}, 10),
    "euler karras": ("EulerDiscreteScheduler", {**SD, "use_karras_sigmas": True}, 10),
    "euler of zero snr": ("EulerDiscreteScheduler", {**SD, **ZERO, **TRAILING}, 10),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", SD, 20),
    "dpmpp_2m leading": (
        "DPMSolverMultistepScheduler",
        {**SD, "timestep_spacing": "leading", "steps_offset": 1},
        20,
    ),
    "dpmpp_2m karras": ("DPMSolverMultistepScheduler", {**SD, "use_karras_sigmas": True}, 20),
    "dpmpp_2m of zero snr": ("DPMSolverMultistepScheduler", {**SD, **ZERO, **TRAILING}, 20),
    "dpmpp_2m karras of zero snr": (
        "DPMSolverMultistepScheduler",
        {**SD, **ZERO, "use_karras_sigmas": True},
        10,
    ),
    "dpmpp of order 3": ("DPMSolverMultistepScheduler", {**SD, "solver_order": 3}, 20),
    "ddim of the cosine table": (
        "DDIMScheduler",
        {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
        10,
    ),
    "unipc": ("UniPCMultistepScheduler", SD, 10),
    "unipc of order 1": ("UniPCMultistepScheduler", {**SD, "solver_order": 1}, 10),
    "unipc karras": ("UniPCMultistepScheduler", {**SD, "use_karras_sigmas": True}, 10),
    "lms": ("LMSDiscreteScheduler", SD, 10),
    "euler trailing of x0 in one step": (
        "EulerDiscreteScheduler",
        {**SD, **TRAILING, "prediction_type": "sample"},
        1,
    ),
    "euler ancestral trailing": ("EulerAncestralDiscreteScheduler", {**SD, **TRAILING}, 4),
    "lcm": ("LCMScheduler", SD, 4),
    "lcm of any number of steps": ("LCMScheduler", SD, 7),
    "lcm of all its times": ("LCMScheduler", SD, 50),
    "lcm of v": (
        "LCMScheduler",
        {**SD, "prediction_type": "v_prediction", "original_inference_steps": 40},
        4,
    ),
    "tcd": ("TCDScheduler", SD, 4),
    "tcd of any number of steps": ("TCDScheduler", {**SD, "prediction_type": "sample"}, 7),
    "flow match": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 10),
}
LARGEST_ERROR = {"lms": 5e-4}
"""In units of the largest number, where it is not that of rounding: the last step of LMS to clean
data is of order 4 in diffusers, and ends in the predicted x0 here."""
KEYS = jax.random.split(jax.random.key(0), 2)
NOISE = np.random.default_rng(0).normal(size=(2, 4, 6, 4)).astype(np.float32)


def network(x, label, module):
    """A function of both inputs that is not linear in either."""
    return 0.7 * module.sin(1.3 * x + label / 150.0) + 0.3 * x


def ours(entries, num_steps):
    schedule = schedule_of(entries, "x")
    path, target, label, solver, grid = (build(part) for part in schedule[:5])
    recipe = Recipe(solver, grid, num_steps, unit_start=schedule.unit_start)
    precond = Precond(target, label, Unscaled())

    def apply(params, x, noise_label, cond, *, key=None):
        del params, cond, key
        return network(x, noise_label[:, None, None, None], jnp)

    predict = denoiser(apply, {}, path, precond)
    start = 1.0 if recipe.unit_start else path.sigma(jnp.asarray(path.t_noise))

    def walk(noise):
        times = recipe.times(path)
        return sample(with_condition(predict, None), solver, path, times, KEYS, start * noise)

    return jax.jit(walk, compiler_options=FAST)(NOISE)


def test_every_scheduler_is_parts_that_fit_together():
    """Times fall from the noise, or from below it, to clean data."""
    for name, (kind, entries, num_steps) in CASES.items():
        schedule = schedule_of({**entries, "_class_name": kind}, "x")
        path: Any = build(schedule.path)
        grid: Any = build(schedule.grid)
        times = np.asarray(grid(path, num_steps))
        assert len(times) == num_steps + 1, name
        assert (np.diff(times) < 0).all(), name
        assert times[0] <= np.float32(path.t_noise), name
        assert times[-1] == 0.0, name


def with_our_noise(monkeypatch, scheduler, drawn):
    """Makes a scheduler of diffusers take `drawn(i)` for the noise of its i-th step."""
    import torch

    steps = iter(range(1000))

    def randn_tensor(*_, **__):
        return torch.tensor(np.array(drawn(next(steps))))

    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", randn_tensor, raising=False)


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_walks_are_those_of_diffusers(name, monkeypatch):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")
    kind, entries, num_steps = CASES[name]
    scheduler = getattr(diffusers, kind)(**entries)
    scheduler.set_timesteps(num_steps)

    def drawn(i):
        keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS, i)
        return normal(keys, NOISE.shape[1:])

    with_our_noise(monkeypatch, scheduler, drawn)
    x = torch.tensor(NOISE) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = x if kind.startswith("Flow") else scheduler.scale_model_input(x, t)
        how = {"eta": 0.3} if kind == "TCDScheduler" else {}
        x = scheduler.step(network(scaled, t, torch), t, x, **how).prev_sample
    found = ours({**scheduler.config, "_class_name": kind}, num_steps)
    assert np.abs(found - x.numpy()).max() < LARGEST_ERROR.get(name, 2e-5) * np.abs(x).max().item()


def test_what_is_not_known_of_a_scheduler_is_refused():
    for entries, said in (
        ({"_class_name": "EulerDiscretScheduler"}, "did you mean 'EulerDiscreteScheduler'"),
        ({"timestep_spacing": "trail"}, "timestep_spacing: 'trail'; did you mean 'trailing'"),
        ({"prediction_type": "eps"}, "prediction_type: 'eps'"),
        ({"beta_schedule": "scaled"}, "beta_schedule: 'scaled' is not known here"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas=True is not known here; False is"),
        ({"variance_type": "learned_range"}, "variance_type='learned_range' is not known here"),
        ({"clip_sample": True, "clip_sample_range": 2.0}, "clip_sample_range=2.0 is not known"),
        ({"thresholding": True, "sample_max_value": 1.5}, "sample_max_value=1.5 is not known"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}, "solver_type='bh1'"),
        ({"interpolation_type": "log_linear"}, "interpolation_type='log_linear' is not known"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": 3}, "solver_order=3"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.02},
            "shift_terminal=0.02 is not known here; None is",
        ),
        ({"beta_start": "small"}, "can't be used"),
        ({"_class_name": "PNDMScheduler"}, "skip_prk_steps=False is not known here"),
    ):
        with pytest.raises(UserError, match=said):
            schedule_of({"_class_name": "DDIMScheduler", **SD1, **entries}, "scheduler.json")


def test_a_dynamic_shift_is_that_of_flux():
    """By hand for 1,024 tokens: mu = 0.5 + 0.65·768/3,840 = 0.63."""
    assert dynamic_shift({}, 1024) == pytest.approx(np.exp(0.63), rel=1e-6)
    entries = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    grid: Any = build(schedule_of(entries, "x", num_tokens=1024).grid)
    assert grid.shift == pytest.approx(np.exp(0.63), rel=1e-6)
    assert grid(Linear(), 4)[3] < 0.002  # The scheduler's own last time, 0.001, shifted.
    u = np.array([1.0, 0.75, 0.5, 0.25, 0.0])
    shifted = np.exp(0.63) * u / (1 + (np.exp(0.63) - 1) * u)
    uniform: Any = build(schedule_of(entries, "x", num_tokens=1024, uniform=True).grid)
    np.testing.assert_allclose(uniform(Linear(), 4), shifted, rtol=1e-6)


def test_thresholding_up_to_one_is_clipping():
    """Diffusers divides x0 by its quantile, cut to [1, sample_max_value]: by 1, if that is 1."""
    entries = {"_class_name": "DDIMScheduler", **SD1, "thresholding": True}
    assert schedule_of(entries, "x").guidance == "cfg+clipped"
    assert schedule_of({**entries, "thresholding": False}, "x").guidance == "cfg"
