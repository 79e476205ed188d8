"""Paths against the papers' tables and integrals in float64, and what every path promises."""

import itertools
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffjax import choices
from diffjax.process import beta_tables, paths, schedules, shifts
from diffjax.process.paths import coeffs, log_snr, time_of_log_snr
from diffjax.spec import build

PATHS = {name: build(spec) for name, spec in choices.PATHS.items()}
EXPLODING = ("ve", "edm")  # a = 1
OTHERS = ("linear", "linear_shifted", "brownian_bridge")
PRESERVING = tuple(name for name in PATHS if name not in (*EXPLODING, *OTHERS))
TABLES = ("ddpm_table", "scaled_linear_table", "cosine_table")
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


N = 129  # times in most tests: one program for each path


def inner_times(path, n=N):
    return jnp.asarray(np.linspace(float(path.t_min), float(path.t_noise), n), jnp.float32)


# The path is not handed to jit: JAX 0.10 takes the structures of different registered dataclasses
# for equal when they have as many fields, and may then run the program of another path.
@cache
def program(path):
    return jax.jit(lambda t: coeffs(path, t, ndim=1))


def scales(path, t):
    """The path and its derivatives at times `t[B]`."""
    return program(path)(t)


def log_snrs(path, t):
    c = scales(path, t)
    return 2.0 * np.log(np.asarray(c.a, np.float64) / np.asarray(c.s, np.float64))


def in_float64(path, t):
    """a and s of a path computed in float64, at times `t[N]`."""
    with jax.enable_x64(True):
        c = scales(path, jnp.asarray(t, jnp.float64))
        return np.asarray(c.a), np.asarray(c.s)


@every_path
def test_a_path_starts_clean_and_loses_signal(path):
    clean = scales(path, jnp.zeros(N))
    assert clean.a[0] == pytest.approx(1.0, abs=1e-7)
    assert clean.s[0] == 0.0
    with np.errstate(divide="ignore"):  # where the signal is gone
        assert (np.diff(log_snrs(path, inner_times(path))) < 0).all()


@every_path
def test_derivatives_match_central_differences_over_the_whole_domain(path):
    low, high = float(path.t_min), float(path.t_noise)
    # Equal steps of time and of its logarithm, off the corners of the tables.
    t = np.concatenate([np.linspace(low, high, 99)[1:-1], np.geomspace(low, high, 34)[1:-1]])
    t = (np.floor(1000.0 * t) + 0.37) / 1000.0
    t = np.clip(t, 1.02 * low, high - 0.003 * (high - low)).astype(np.float32)
    c = scales(path, jnp.asarray(t))
    h = 1e-5 * t.astype(np.float64)
    (a_up, s_up), (a_down, s_down) = (in_float64(path, t + step) for step in (h, -h))
    # Relative to the fastest change: a' of the cosine path vanishes at one end, s' at the other.
    scale = np.hypot((a_up - a_down) / (2 * h), (s_up - s_down) / (2 * h))
    np.testing.assert_allclose(c.da / scale, (a_up - a_down) / (2 * h) / scale, atol=2e-4)
    np.testing.assert_allclose(c.ds / scale, (s_up - s_down) / (2 * h) / scale, atol=2e-4)


@every_path
def test_float32_keeps_the_digits_of_both_scales(path):
    """Relative errors, so that neither s near clean data nor a near pure noise is lost."""
    t = inner_times(path)
    c = scales(path, t)
    for mine, exact in zip((c.a, c.s), in_float64(path, np.asarray(t)), strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", PRESERVING)
def test_variance_preserving_paths_preserve_variance(name):
    path = PATHS[name]
    _, a, s, _, _ = scales(path, inner_times(path))
    if name == "sub_vp":  # Song et al. 2021: its variance is s² = (1 - a²)², not 1 - a²
        s = jnp.sqrt(s)
    np.testing.assert_allclose(a**2 + s**2, 1.0, atol=1e-6)


@every_path
def test_time_of_log_snr_inverts_log_snr(path):
    t = inner_times(path)
    with np.errstate(divide="ignore"):  # minus infinity, where the signal is gone, is a value
        values = jnp.asarray(log_snrs(path, t), jnp.float32)
    values = values.at[jnp.array([5, 6])].set(jnp.array([1e3, -1e3]))  # out of range
    found = np.array(time_of_log_snr(path, values))
    np.testing.assert_allclose(found[5:7], [path.t_min, path.t_noise], rtol=1e-5)
    found[5:7] = t[5:7]
    np.testing.assert_allclose(found, t, rtol=1e-4, atol=2e-5)


positive = st.floats(0.05, 20.0)


@settings(max_examples=16, deadline=None, derandomize=True, database=None)
@given(
    path=st.one_of(
        st.builds(
            schedules.Sigmoid, st.floats(-4.0, 0.5), st.floats(1.0, 4.0), tau=st.floats(0.4, 2.0)
        ),
        st.builds(schedules.VarianceExploding, st.floats(0.001, 0.1), st.floats(1.0, 500.0)),
        st.builds(paths.LinearBeta, st.floats(0.01, 1.0), st.floats(2.0, 30.0)),
        st.builds(schedules.SubVP, st.floats(0.01, 1.0), st.floats(2.0, 30.0), st.just(0.05)),
        st.builds(shifts.TimeShift, st.just(paths.Linear()), positive),
        st.builds(shifts.LogSNRShift, st.sampled_from(list(PATHS.values())), positive),
        st.builds(shifts.ZeroTerminalSNR, st.just(paths.Cosine(t_noise=0.95))),
        st.builds(schedules.LinearLogSNR, st.floats(5.0, 15.0), st.floats(-15.0, 2.0)),
    )
)
def test_paths_keep_their_promises_at_other_numbers(path):
    t = inner_times(path)
    with np.errstate(divide="ignore"):
        assert (np.diff(log_snrs(path, t)) < 0).all()
    clean = scales(path, jnp.zeros(N))
    assert clean.a[0] == pytest.approx(1.0, abs=1e-6)
    assert clean.s[0] == 0.0
    assert all(np.isfinite(each).all() for each in scales(path, t))


# Tables, multiplied out in float64 as their papers define them.


def published_betas(name, num_steps=1000):
    if name == "ddpm_table":
        return np.linspace(1e-4, 0.02, num_steps)
    if name == "scaled_linear_table":
        return np.linspace(0.00085**0.5, 0.012**0.5, num_steps) ** 2
    kept = [np.cos((k / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2 for k in range(num_steps + 1)]
    return np.array([min(1 - kept[k + 1] / kept[k], 0.999) for k in range(num_steps)])


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_the_product_of_its_betas(name):
    kept = np.cumprod(1.0 - published_betas(name))
    t = jnp.arange(1, 1001) / 1000.0
    _, a, s, _, _ = scales(PATHS[name], t)
    # The cosine table's last step is clipped: 0.001 of the variance is left of the step before.
    np.testing.assert_allclose(np.asarray(a, np.float64) ** 2, kept, rtol=1e-3)
    np.testing.assert_allclose(np.asarray(s, np.float64) ** 2, 1.0 - kept, rtol=1e-4)


def test_the_cosine_table_is_clipped_where_the_paper_clips():
    betas = published_betas("cosine_table")
    assert betas[-1] == 0.999
    assert betas[-2] < 0.999
    a = PATHS["cosine_table"].alpha(jnp.array([0.999, 1.0]))
    assert float((a[1] / a[0]) ** 2) == pytest.approx(1e-3, rel=1e-3)
    # A lower clip acts on more steps.
    strict = beta_tables.CosineBetas(max_beta=0.02)
    a = np.asarray(strict.alpha(jnp.arange(1001) / 1000.0), np.float64)
    expected = np.minimum(betas, 0.02)
    np.testing.assert_allclose(1 - (a[1:] / a[:-1]) ** 2, expected, rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("name", TABLES)
def test_between_the_steps_the_rate_of_noise_is_constant(name):
    kept = np.cumprod(1.0 - published_betas(name))
    for step in (1, 400, 900):
        a = PATHS[name].alpha(jnp.array([step + 0.25]) / 1000.0)
        expected = kept[step - 1] ** 0.75 * kept[step] ** 0.25
        assert float(a[0] ** 2) == pytest.approx(expected, rel=1e-3)


def test_linear_beta_is_the_limit_of_the_table():
    # log(1 - b) = -b - b²/2 - …, and b <= 0.02: the logarithms differ by 1 % at most.
    kept = np.cumprod(1.0 - published_betas("ddpm_table"))
    steps = np.array([100, 300, 500, 1000])
    alpha = np.asarray(paths.LinearBeta().alpha(jnp.asarray(steps / 1000.0)), np.float64)
    np.testing.assert_allclose(np.log(alpha**2), np.log(kept[steps - 1]), rtol=0.012)


@pytest.mark.parametrize("name", TABLES)
def test_zero_terminal_snr_is_the_published_rescaling_but_for_the_first_step(name):
    """Lin et al. 2023, algorithm 1: shift `√ᾱ` so that the last is 0, scale so the first stays.

    Theirs keeps `√ᾱ_1`, ours `√ᾱ_0 = 1`, so ours is theirs with one constant factor.
    """
    t_noise = float(PATHS[name].t_noise)
    num = round(1000 * t_noise)
    root = np.sqrt(np.cumprod(1.0 - published_betas(name)))[:num]
    published = (root - root[-1]) * root[0] / (root[0] - root[-1])
    path = shifts.ZeroTerminalSNR(PATHS[name])
    t = jnp.asarray(np.arange(1, num + 1) / 1000.0)
    _, a, s, _, _ = (np.asarray(each, np.float64) for each in scales(path, t))
    assert a[-1] == pytest.approx(0.0, abs=1e-7)
    assert s[-1] == pytest.approx(1.0, abs=1e-6)
    factor = (root[0] - root[-1]) / (root[0] * (1.0 - root[-1]))
    np.testing.assert_allclose(a, factor * published, atol=1e-6)
    np.testing.assert_allclose(a, published, atol=5e-5)  # how much the difference is
    np.testing.assert_allclose(a**2 + s**2, 1.0, atol=1e-6)


@pytest.mark.parametrize("name", TABLES)
def test_rounding_leaves_no_negative_signal(name):
    """A time that rounding moved past the end would have log-SNR nan, and so would its label."""
    path = shifts.ZeroTerminalSNR(PATHS[name])
    ulps = np.arange(N) * np.spacing(np.float32(path.t_noise))
    c = scales(path, jnp.asarray(np.float32(path.t_noise) + ulps))
    assert (np.asarray(c.a) >= 0.0).all()
    assert (np.asarray(c.da)[0] < -0.01).all()  # and the velocity is not cut off with it


def test_zero_terminal_snr_keeps_the_variance_of_any_path():
    inner = paths.Linear(t_noise=0.9)
    t = inner_times(inner)
    path = shifts.ZeroTerminalSNR(inner)
    before, after = (scales(p, t) for p in (inner, path))
    np.testing.assert_allclose(after.a**2 + after.s**2, before.a**2 + before.s**2, rtol=1e-6)
    assert after.a[-1] == pytest.approx(0.0, abs=1e-7)


# Shifts.


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_a_time_shift_on_the_linear_path_shifts_log_snr(shift):
    path = shifts.TimeShift(paths.Linear(), shift)
    t = inner_times(path)
    with np.errstate(divide="ignore"):
        expected = log_snrs(paths.Linear(), t) - 2.0 * np.log(shift)
        np.testing.assert_allclose(log_snrs(path, t), expected, atol=5e-5)
    # Esser et al. 2024, equation 23, at one number.
    assert path.sigma(jnp.array(0.25)) == pytest.approx(shift * 0.25 / (1 + (shift - 1) * 0.25))


def test_rounding_shifts_no_time_past_the_end():
    """There `a` of the linear path would be negative, log-SNR nan, and sampling starts there."""
    for shift in np.linspace(0.3, 4.0, 75):
        path = shifts.TimeShift(paths.Linear(), float(shift))
        end, slope = jax.jvp(path.alpha, (jnp.ones(1),), (jnp.ones(1),))
        assert end[0] >= 0.0
        assert slope[0] == pytest.approx(-1.0 / shift, rel=1e-5)


@pytest.mark.parametrize("path", [PATHS["edm"], PATHS["cosine"], PATHS["ve"]], ids=str)
def test_a_time_shift_keeps_the_ends_of_any_path(path):
    shifted = shifts.TimeShift(path, 3.0)
    ours, theirs = (log_snrs(p, inner_times(p))[[0, -1]] for p in (shifted, path))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("path", "scale"), [*((path, 0.5) for path in PATHS.values()), (PATHS["cosine"], 3.0)], ids=str
)
def test_a_log_snr_shift_is_exact_and_keeps_the_variance(path, scale):
    shifted = shifts.LogSNRShift(path, scale)
    t = inner_times(path)
    with np.errstate(divide="ignore"):
        expected = log_snrs(path, t) + 2.0 * np.log(scale)
        np.testing.assert_allclose(log_snrs(shifted, t), expected, atol=3e-5)
    before, after = (scales(each, t) for each in (path, shifted))
    np.testing.assert_allclose(after.a**2 + after.s**2, before.a**2 + before.s**2, rtol=1e-6)


# Published definitions of the others.


def test_the_sigmoid_path_is_algorithm_1():
    # Chen 2023 (arXiv:2301.10972), algorithm 1, sigmoid_schedule, without its final clip.
    start, end, tau = -3.0, 2.0, 0.7
    path = schedules.Sigmoid(start, end, tau)
    t = np.asarray(inner_times(path), np.float64)
    v = 1.0 / (1.0 + np.exp(-np.array([start, end]) / tau))
    output = 1.0 / (1.0 + np.exp(-(t * (end - start) + start) / tau))
    gamma = (v[1] - output) / (v[1] - v[0])
    c = scales(path, jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(c.a**2, gamma, rtol=2e-4)
    np.testing.assert_allclose(c.s**2, 1.0 - gamma, rtol=2e-4)


def variance_by_integration(drift: Any, diffusion_squared: Any, times: np.ndarray):
    """`s²` of `dx = drift·x dt + g dw` from clean data: `ds²/dt = 2·drift·s² + g²`, Runge-Kutta."""

    def slope(t, state):
        log_a, variance = state
        return np.array([drift(t), 2.0 * drift(t) * variance + diffusion_squared(t, log_a)])

    state, results = np.zeros(2), []
    for t, t_next in itertools.pairwise(times):
        h = t_next - t
        k1 = slope(t, state)
        k2 = slope(t + h / 2, state + h / 2 * k1)
        k3 = slope(t + h / 2, state + h / 2 * k2)
        k4 = slope(t_next, state + h * k3)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        results.append(state)
    log_a, variance = np.array(results).T
    return np.exp(log_a), np.sqrt(variance)


def beta(t):
    return 0.1 + t * 19.9


# Song et al. 2021 (arXiv:2011.13456), equations 9, 11, 12 and 33 of the SDEs themselves.
SDES: dict[str, tuple[Any, Any]] = {
    "ve": (lambda t: 0.0, lambda t, _: 0.01**2 * 5000.0 ** (2 * t) * 2 * np.log(5000.0)),
    "ddpm": (lambda t: -0.5 * beta(t), lambda t, _: beta(t)),
    "sub_vp": (
        lambda t: -0.5 * beta(t),
        lambda t, log_a: beta(t) * (1.0 - np.exp(4.0 * log_a)),
    ),
}


@pytest.mark.parametrize("name", SDES)
def test_a_path_is_the_kernel_of_its_sde(name):
    times = np.linspace(0.0, 1.0, 8 * N + 1)
    a, s = variance_by_integration(*SDES[name], times)
    c = scales(PATHS[name], jnp.asarray(times[8::8], jnp.float32))
    np.testing.assert_allclose(c.a, a[7::8], rtol=2e-5)
    np.testing.assert_allclose(c.s, s[7::8], rtol=2e-4)


def test_the_log_snr_of_vdm_is_linear_from_end_to_end():
    path = schedules.LinearLogSNR()
    t = inner_times(path, 5)
    np.testing.assert_allclose(log_snr(path, t), np.linspace(13.3, -5.0, 5), atol=1e-4)
    # Below t_min it goes on without a jump.
    below = log_snr(path, jnp.array([0.999e-3, 0.5e-3]))
    np.testing.assert_allclose(below, [13.302, 13.3 + 2 * np.log(2)], atol=1e-4)


def test_numbers_of_a_path_are_traced():
    """A sweep over a path's numbers is one program, and the schedule has gradients."""
    shifted = jax.vmap(lambda shift: shifts.TimeShift(paths.Linear(), shift).sigma(jnp.array(0.5)))
    np.testing.assert_allclose(shifted(jnp.array([1.0, 3.0])), [0.5, 0.75], rtol=1e-6)
    slope = jax.grad(lambda high: paths.LinearBeta(beta_max=high).alpha(jnp.array(0.5)))(20.0)
    expected = -0.25 * 0.25 * float(paths.LinearBeta().alpha(jnp.array(0.5)))
    assert float(slope) == pytest.approx(expected, rel=1e-5)
