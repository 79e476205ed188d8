"""Schedulers of diffusers as our parts: the walks of both from the same noise."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.conditions import Unconditional
from diffjax.errors import UserError
from diffjax.exchange.schedulers import dynamic_shift, schedule_of
from diffjax.process.beta_tables import CosineBetas
from diffjax.process.paths import Linear
from diffjax.process.precond import Precond, Unscaled, denoiser
from diffjax.sampling.grids import Linspace
from diffjax.sampling.guidance import (
    ClassifierFree,
    Clipped,
    GuidanceModels,
    Thresholded,
    guide,
)
from diffjax.sampling.sample import Recipe, sample, with_condition
from diffjax.sampling.solvers import normal
from diffjax.spec import build
from tests.support.compiling import FAST
from tests.support.witnesses import witnesses

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


KANDINSKY = {
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample_range": 2.0,
    "variance_type": "learned_range",
}
THRESHOLDS = {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9}
UNCLIP = {"prediction_type": "sample", "clip_sample_range": 0.8}
FRESH_NOISE: dict[str, tuple[str, dict[str, Any], int]] = {
    "ddpm": ("DDPMScheduler", KANDINSKY | {"variance_type": "fixed_small"}, 10),
    "ddpm of a learned variance": ("DDPMScheduler", KANDINSKY, 10),
    "ddpm with thresholds": ("DDPMScheduler", KANDINSKY | THRESHOLDS, 20),
    "unclip": ("UnCLIPScheduler", UNCLIP, 25),
    "unclip of a learned variance": (
        "UnCLIPScheduler",
        UNCLIP | {"variance_type": "learned_range"},
        10,
    ),
}


def network(x, label, module):
    """A function of both inputs that is not linear in either."""
    return 0.7 * module.sin(1.3 * x + label / 150.0) + 0.3 * x


def variance(x, label, module):
    """The second output, from -1 to 1."""
    return module.sin(x + label)


def ours(entries, num_steps):
    schedule = schedule_of(entries, "x")
    path, target, label, solver, grid, rule = (build(part) for part in schedule[:6])
    recipe = Recipe(solver, grid, num_steps, unit_start=schedule.unit_start)
    precond = Precond(target, label, Unscaled())

    def apply(params, x, noise_label, cond, *, key=None):
        del params, cond, key
        label = noise_label[:, None, None, None]
        return jnp.concatenate([network(x, label, jnp), variance(x, label, jnp)], -1)

    predict = denoiser(apply, {}, path, precond, learned_variance=True)
    predict = guide(GuidanceModels(predict, Unconditional()), path, rule)
    start = 1.0 if recipe.unit_start else path.sigma(jnp.asarray(path.t_noise))

    def walk(noise):
        times = recipe.times(path)
        return sample(with_condition(predict, None), solver, path, times, KEYS, start * noise)

    return jax.jit(walk, compiler_options=FAST)(NOISE)


def fit_together(cases):
    """Times fall from the noise, or from below it, to clean data."""
    for name, (kind, entries, num_steps) in cases.items():
        schedule = schedule_of({**entries, "_class_name": kind}, "x")
        path: Any = build(schedule.path)
        grid: Any = build(schedule.grid)
        times = np.asarray(grid(path, num_steps))
        assert len(times) == num_steps + 1, name
        assert (np.diff(times) < 0).all(), name
        assert times[0] <= np.float32(path.t_noise), name
        assert times[-1] == 0.0, name


def test_one_of_each_scheduler_is_parts_that_fit_together():
    of_each = {kind: name for name, (kind, *_) in reversed(CASES.items())}
    fit_together({name: CASES[name] for name in of_each.values()})


@pytest.mark.thorough(tenth=False)
def test_every_scheduler_is_parts_that_fit_together():
    fit_together(CASES)


def with_our_noise(monkeypatch, scheduler, drawn):
    """Makes a scheduler of diffusers take `drawn(i)` for the noise of its i-th step."""
    import torch

    steps = iter(range(1000))

    def randn_tensor(*_, **__):
        return torch.tensor(np.array(drawn(next(steps))))

    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", randn_tensor, raising=False)


# Each kind of scheduler, target, spacing and end at least once.
QUICK = (
    "ddim", "ddim of zero snr", "ddim of the cosine table", "pndm", "euler leading",
    "euler karras", "euler trailing of x0 in one step", "dpmpp_2m leading",
    "dpmpp_2m karras of zero snr", "dpmpp of order 3", "unipc", "lms",
    "euler ancestral trailing", "lcm", "tcd of any number of steps", "flow match",
)  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("name", witnesses(CASES, QUICK))
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


def walk_of_diffusers(kind, entries, num_steps, monkeypatch):
    """The walk with the noise of ours, and the noise of its last step."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")
    from diffusers.schedulers import scheduling_ddpm, scheduling_unclip

    scheduler = getattr(diffusers, kind)(**entries)
    # In float32 the last step of unCLIP is off (test_unclip_rounds_its_last_step).
    scheduler.betas = scheduler.betas.double()
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.set_timesteps(num_steps)
    keys, drawn = jax.random.split(jax.random.key(0), len(NOISE)), []

    def noise(shape, **_):
        step = jax.vmap(jax.random.fold_in, (0, None))(keys, len(drawn))
        drawn.append(torch.tensor(np.array(normal(step, NOISE.shape[1:])).transpose(0, 3, 1, 2)))
        return drawn[-1]

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", noise)
    monkeypatch.setattr(scheduling_unclip, "randn_tensor", noise)
    x = torch.tensor(NOISE.transpose(0, 3, 1, 2))
    times, last = [*scheduler.timesteps], {}
    for t, after in zip(times, [*times[1:], None], strict=True):
        output = network(x, t, torch)
        if "learned" in scheduler.config.variance_type:
            output = torch.cat([output, variance(x, t, torch)], 1)
        how = {"prev_timestep": after} if kind.startswith("UnCLIP") else {}
        last = {"x": x, "t": t, "count": len(drawn)}
        x = scheduler.step(output, t, x, **how).prev_sample
    left = drawn[last["count"]] if len(drawn) > last["count"] else None
    return scheduler, x, last, left


@pytest.mark.parity
@pytest.mark.parametrize(
    "name", witnesses(FRESH_NOISE, ["ddpm with thresholds", "unclip of a learned variance"])
)
def test_walks_with_fresh_noise_are_those_of_diffusers(name, monkeypatch):
    kind, entries, num_steps = FRESH_NOISE[name]
    scheduler, x, _, left = walk_of_diffusers(kind, entries, num_steps, monkeypatch)
    assert left is None
    found = ours({**scheduler.config, "_class_name": kind}, num_steps)
    expected = x.numpy().transpose(0, 2, 3, 1)
    assert np.abs(expected).max() < 2.1
    assert np.abs(found - expected).max() < 2e-5


@pytest.mark.parity
def test_unclip_rounds_its_last_step():
    """To clean data it multiplies x0 by β/(1 - ᾱ) of the table's first step, which is 1 exactly.

    In float32 the difference 1 - ᾱ of 4e-5 has lost digits, and the factor is 0.9995.
    """
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[parity]'")
    scheduler = diffusers.UnCLIPScheduler(prediction_type="sample")
    last = scheduler.step(torch.ones(1, 1), 0, torch.zeros(1, 1)).prev_sample.item()
    beta = np.float64(scheduler.betas[0])
    one = beta / (1 - (1 - beta))
    assert one == pytest.approx(1.0, rel=1e-9)
    assert 1e-4 < abs(last - one) < 1e-3


@pytest.mark.parity
def test_the_noise_that_diffusers_leaves_with_an_offset_is_that_of_its_last_variance(monkeypatch):
    """The posterior of clean data has a variance of 0, which it takes for 1e-20.

    With `steps_offset=1` the last step is not the table's first, and noise is added in it, of a
    variance β^v·1e-20^(1 - v) by a learned v. Here the walk ends in the predicted x0.
    """
    entries = {**KANDINSKY, "steps_offset": 1}
    scheduler, x, last, left = walk_of_diffusers("DDPMScheduler", entries, 10, monkeypatch)
    assert left is not None
    found = ours({**scheduler.config, "_class_name": "DDPMScheduler"}, 10)
    alpha_bar = np.cumprod(1 - np.linspace(0.00085, 0.012, 1000))[last["t"]]
    share = (1 + variance(last["x"].numpy(), last["t"].numpy(), np)) / 2
    noise = np.sqrt((1 - alpha_bar) ** share * 1e-20 ** (1 - share)) * left.numpy()
    assert np.abs(noise).max() > 0.05
    difference = (x.numpy() - noise).transpose(0, 2, 3, 1) - np.asarray(found)
    assert np.abs(difference).max() < 2e-5


def test_the_grid_of_unclip_is_linspace():
    """`round(i·999/(n - 1))`, but for halves, where rounding errors decide there.

    13·999/26 = 499.5 is 499 there and 500, the even one, here.
    """
    for n in (2, 25, 27):
        steps = np.round(np.arange(n) * (999 / (n - 1)))[::-1]
        times = np.asarray(Linspace()(CosineBetas(t_noise=1.0), n))
        found = np.round(times[:-1] * 1000) - 1
        halves = 2 * np.arange(n)[::-1] * 999 % (2 * (n - 1)) == n - 1
        np.testing.assert_array_equal(found[~halves], steps[~halves], str(n))
        assert (np.abs(found - steps) <= 1).all(), n


def test_what_is_not_known_of_a_scheduler_is_refused():
    for entries, said in (
        ({"_class_name": "EulerDiscretScheduler"}, "did you mean 'EulerDiscreteScheduler'"),
        ({"timestep_spacing": "trail"}, "timestep_spacing: 'trail'; did you mean 'trailing'"),
        ({"prediction_type": "eps"}, "prediction_type: 'eps'"),
        ({"beta_schedule": "scaled"}, "beta_schedule: 'scaled' is not known here"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas=True is not known here; False is"),
        ({"variance_type": "learned"}, "variance_type='learned' is not known here"),
        ({"thresholding": True, "sample_max_value": 0.5}, "sample_max_value=0.5 is below 1"),
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
    rules = [
        build(schedule_of({**entries, **more}, "x").guidance)
        for more in (
            {},
            {"sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9},
            {"thresholding": False, "clip_sample": True, "clip_sample_range": 5.0},
            {"thresholding": False},
        )
    ]
    clipped = Clipped(), Thresholded(quantile=0.9, largest=2.0), Clipped(limit=5.0)
    assert rules == [*clipped, ClassifierFree()]
