"""Weights against the papers' formulas, and objectives that are one loss in other words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffjax import choices
from diffjax.compiling import once
from diffjax.objectives.denoising import Denoising
from diffjax.process import paths, shifts, times, weights
from diffjax.process.paths import coeffs, log_snr
from diffjax.process.precond import Precond, TimeLabel
from diffjax.spec import build

PATHS = {name: build(spec) for name, spec in choices.PATHS.items()}
TARGETS = {name: build(spec) for name, spec in choices.TARGETS.items()}
WEIGHTS = {name: build(spec) for name, spec in choices.WEIGHTS.items()}
TIMES = {name: build(spec) for name, spec in choices.TIMES.items()}

# What the papers print, as functions of SNR: (what multiplies errors of x0, of the noise, of v on a
# variance-preserving path).
PUBLISHED = {
    "snr": (lambda r: r, lambda r: np.ones_like(r), lambda r: r / (r + 1)),
    "snr_plus_one": (lambda r: r + 1, lambda r: 1 + 1 / r, lambda r: np.ones_like(r)),
    "truncated_snr": (
        lambda r: np.maximum(r, 1),
        lambda r: np.maximum(1, 1 / r),
        lambda r: np.maximum(r, 1) / (r + 1),
    ),
    # Hang et al. 2023, section 3.4
    "min_snr": (
        lambda r: np.minimum(r, 5),
        lambda r: np.minimum(r, 5) / r,
        lambda r: np.minimum(r, 5) / (r + 1),
    ),
    # Crowson et al. 2024: the harmonic form of the minimum
    "soft_min_snr": (
        lambda r: 1 / (1 / r + 1 / 4),
        lambda r: 4 / (r + 4),
        lambda r: 4 * r / ((r + 4) * (r + 1)),
    ),
    "p2": (lambda r: r / (1 + r), lambda r: 1 / (1 + r), lambda r: r / (1 + r) ** 2),
    "debiased": (lambda r: r**0.5, lambda r: r**-0.5, lambda r: r**0.5 / (r + 1)),
}


@jax.jit
def published_weights(t):
    """In the spaces of x0, of the noise and of v."""
    c = coeffs(PATHS["ddpm"], t, ndim=1)
    mixes = [TARGETS[name](c) for name in ("clean", "noise", "v")]
    return {name: [WEIGHTS[name](c, k) for k in mixes] for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_weight_is_the_published_one_in_every_space(name):
    t = np.linspace(0.01, 0.99, 99)
    # The path in closed form, in float64.
    log_a2 = -0.5 * t**2 * 19.9 - t * 0.1
    snr = np.exp(log_a2) / -np.expm1(log_a2)
    found = published_weights(np.float32(t))[name]
    for weight, expected in zip(found, PUBLISHED[name], strict=True):
        np.testing.assert_allclose(weight, expected(snr), rtol=2e-4)


def test_edm_is_table_1():
    sigma = np.geomspace(0.002, 80.0, 33)
    c = coeffs(PATHS["edm"], jnp.asarray(sigma), ndim=1)
    expected = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    np.testing.assert_allclose(WEIGHTS["edm"](c, TARGETS["clean"](c)), expected, rtol=1e-5)
    np.testing.assert_allclose(WEIGHTS["edm"](c, TARGETS["f"](c)), 1.0, rtol=1e-5)


def test_jits_weight_is_the_error_of_a_velocity_whose_division_is_clipped():
    # x0_hat and x0 are turned to velocities by (x - z)/max(t, 0.05), in the authors' code.
    t = np.array([0.001, 0.04, 0.06, 0.5, 1.0], np.float32)
    c = coeffs(PATHS["linear"], t, ndim=1)
    found = WEIGHTS["constant_velocity_jit"](c, TARGETS["clean"](c))
    np.testing.assert_allclose(found, 1 / np.maximum(t, 0.05) ** 2, rtol=1e-5)


@pytest.mark.parametrize("space", TARGETS)
def test_a_constant_in_another_space_is_its_plain_loss(space):
    """An error of x0 by 1 is one of `k_x - k_e·a/s` there."""
    c = coeffs(PATHS["cosine"], jnp.linspace(0.01, 0.99, 99), ndim=1)
    there = TARGETS[space](c)
    expected = np.square(there.k_x - there.k_e * c.a / c.s)
    constant = WEIGHTS[f"constant_{space.removesuffix('_to_data')}"]  # a sign changes no weight
    np.testing.assert_allclose(constant(c, TARGETS["clean"](c)), expected, rtol=1e-5)
    np.testing.assert_allclose(constant(c, there), 1.0, rtol=1e-5)


log_snrs = once()(log_snr)


@once()
def bounds(path, t):
    c = coeffs(path, t, ndim=1)
    both = weights.ELBO(), weights.Sigmoid(bias=1.5)
    return {name: [weight(c, TARGETS[name](c)) for weight in both] for name in ("noise", "clean")}


@pytest.mark.parametrize("name", ["linear", "cosine", "ddpm", "sub_vp", "edm", "ve", "sigmoid"])
def test_elbo_is_the_speed_of_snr(name):
    """`-½·dSNR/dt` for x0, `-½·dλ/dt` for the noise, by finite differences in float64."""
    path = PATHS[name]
    low, high = float(path.t_min), float(path.t_noise)
    t = np.linspace(low + 0.01 * (high - low), high - 0.01 * (high - low), 99).astype(np.float32)
    h = 1e-5 * t.astype(np.float64)
    with jax.enable_x64(True):
        ahead, behind, here = np.asarray(log_snrs(path, np.stack([t + h, t - h, t + 0 * h])))
    speed = -0.5 * (ahead - behind) / (2 * h)
    found = bounds(path, t)
    for target, factor in (("noise", 1.0), ("clean", np.exp(here))):
        weight, sigmoid = found[target]
        np.testing.assert_allclose(weight, speed * factor, rtol=2e-4)
        np.testing.assert_allclose(sigmoid, speed * factor / (1 + np.exp(here - 1.5)), rtol=2e-4)


# Effective weights: what a unit of log-SNR pays for squared errors of the noise.

LAMBDA = np.linspace(-4.5, 6.5, 34, dtype=np.float32)
x = np.asarray(LAMBDA, np.float64)


def objective(path, target, weight="constant", density="uniform"):
    """Parts are given by name or as themselves."""
    tables = (PATHS, TARGETS, WEIGHTS, TIMES)
    path, target, weight, density = (
        table[part] if isinstance(part, str) else part
        for table, part in zip(tables, (path, target, weight, density), strict=True)
    )
    return Denoising(path, Precond(target, TimeLabel()), weight, density)


def effective(*names):
    """The effective weights at `LAMBDA` of some objectives, by one program."""
    program = jax.jit(lambda x: [objective(*each).effective_weight(x) for each in names])
    return [np.asarray(found, np.float64) for found in program(LAMBDA)]


# Pairs that are one loss, factor and all.
EQUAL = {
    "v is x0 with SNR + 1": (("cosine", "v"), ("cosine", "clean", "snr_plus_one")),
    "the same on another path": (("ddpm", "v"), ("ddpm", "noise", "snr_plus_one")),
    "noise is x0 with SNR": (("ddpm", "noise"), ("ddpm", "clean", "snr")),
    "noise by v": (("cosine", "noise"), ("cosine", "v", "constant_noise")),
    "x0 by noise": (("edm", "clean"), ("edm", "noise", "constant_clean")),
    "velocity by noise": (("sub_vp", "velocity"), ("sub_vp", "noise", "constant_velocity")),
    "score by v": (("ddpm", "score"), ("ddpm", "v", "constant_score")),
    "F is its own weight for x0": (("edm", "f"), ("edm", "clean", "edm")),
    "F by v": (("ve", "f"), ("ve", "v", "constant_f")),
    "EDM": (
        ("edm", "f", "constant", "log_normal"),
        ("edm", "noise", "edm", "log_normal"),
    ),
    "log-normal times know no path": (
        ("edm", "noise", "min_snr", times.LogNormal(-0.4, 0.7)),
        ("cosine", "v", "min_snr", times.LogNormal(-0.4, 0.7)),
    ),
    "likelihood weighting": (
        # Song et al. 2021 (arXiv:2101.09258): g² for the score, here ½·dσ²/dt = s on EDM's path.
        ("edm", "noise", "elbo"),
        ("edm", "score", lambda c, k: c.s),
    ),
}


def test_objectives_that_are_proven_equal_are_equal():
    sides = [side for sides in EQUAL.values() for side in sides]
    found = effective(*sides)
    for name, one, other in zip(EQUAL, found[::2], found[1::2], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, err_msg=name)


# Kingma & Gao 2023 (arXiv:2303.00848), table 1 and appendix D: w(λ) up to a factor.
PROPORTIONAL = {
    "flow matching": (("linear", "velocity"), np.exp(-x / 2)),
    "v on the cosine path": (("cosine", "v"), np.exp(-x / 2)),
    "velocity on the cosine path": (("cosine", "velocity"), np.exp(-x / 2)),
    "noise on the cosine path": (("cosine", "noise"), 1 / np.cosh(x / 2)),
    "v, shifted cosine": (
        ("cosine_shifted", "v"),
        1 / np.cosh((x - 2 * np.log(0.5)) / 2) * (1 + np.exp(-x)),
    ),
    "EDM": (
        ("edm", "f", "constant", "log_normal"),
        scipy.stats.norm.pdf(x, 2.4, 2.4) * (np.exp(-x) + 0.5**2),
    ),
    "min-SNR on the cosine path": (
        ("cosine", "v", "min_snr"),
        np.minimum(1, 5 * np.exp(-x)) / np.cosh(x / 2),
    ),
    "p2 on the cosine path": (("cosine", "noise", "p2"), 1 / (1 + np.exp(x)) / np.cosh(x / 2)),
    "the bound": (("cosine", "v", "elbo"), np.ones_like(x)),
    "the bound, where log-SNR is linear": (("linear_log_snr", "noise"), np.ones_like(x)),
    "the bound by times": (("ddpm", "noise", "constant", "uniform_log_snr"), np.ones_like(x)),
    "sigmoid": (("ddpm", "noise", "sigmoid"), 1 / (1 + np.exp(x - 2))),
    "sigmoid, lower": (("cosine", "v", "sigmoid_low"), 1 / (1 + np.exp(x + 1))),
    "SD3": (
        (paths.Linear(t_min=0.0), "velocity", "constant", times.LogitNormal(0.3, 0.8)),
        # t/(1 - t) = s/a, so λ = -2·logit(t), and (D/a)² = (1 + s/a)²
        scipy.stats.norm.pdf(x, -0.6, 1.6) * (1 + np.exp(-x / 2)) ** 2,
    ),
    "SD3's CosMap is the cosine path's log-SNR": (
        ("linear", "noise", "constant", "cos_map"),
        1 / np.cosh(x / 2),
    ),
}


def test_effective_weights_are_the_published_ones():
    found = effective(*(names for names, _ in PROPORTIONAL.values()))
    for (name, (_, expected)), weight in zip(PROPORTIONAL.items(), found, strict=True):
        # t_min and t_noise cut the densities off by a thousandth: the rest is stretched that much.
        ratio = weight / expected
        np.testing.assert_allclose(ratio / np.median(ratio), 1.0, rtol=1.5e-2, err_msg=name)


def test_the_bound_is_flat_in_log_snr_and_has_its_factor():
    """`p(λ)·½|dλ/dt| = ½·p(t)`: half the mean over time of what the bound integrates."""
    names = ("linear", "cosine", "ddpm", "sub_vp", "sigmoid")
    for name, weight in zip(names, effective(*((n, "v", "elbo") for n in names)), strict=True):
        expected = 0.5 / (float(PATHS[name].t_noise) - float(PATHS[name].t_min))
        np.testing.assert_allclose(weight, expected, rtol=5e-4, err_msg=name)


def test_the_table_and_its_limit_weigh_alike():
    kinds = ("constant", "min_snr", "p2")
    continuous = effective(*(("ddpm", "noise", kind) for kind in kinds))
    table = effective(*(("ddpm_table", "noise", kind, "discrete") for kind in kinds))
    inside = (x > -4) & (x < 3)
    for kind, found, limit in zip(kinds, table, continuous, strict=True):
        # The steps of the table are 0.001 wide: at log-SNR 6.5 log-SNR falls by a tenth in one.
        np.testing.assert_allclose(found, limit, rtol=0.06, err_msg=kind)
        np.testing.assert_allclose(found[inside], limit[inside], rtol=0.015, err_msg=kind)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_a_time_shift_is_a_density_over_times(shift):
    """Uniform times on the shifted path are times `t(u)` on the plain one: SD3, section 5.3.2."""
    path = shifts.TimeShift(paths.Linear(t_min=0.0), shift)
    # dt/du = shift/(1 + (shift - 1)·u)², by hand
    weight, plain = effective((path, "noise"), (paths.Linear(t_min=0.0), "noise"))
    t = 1 / (1 + np.exp(x / 2))
    u = t / (shift - (shift - 1) * t)
    density = (1 + (shift - 1) * u) ** 2 / shift
    np.testing.assert_allclose(weight, plain * density, rtol=1e-3)


def test_different_objectives_differ():
    """The comparisons above can fail: 'noise' and 'v' are no factor apart."""
    noise, v = effective(("cosine", "noise"), ("cosine", "v"))
    ratio = noise / v
    assert ratio.max() / ratio.min() > 2
