"""Paths against the papers' tables and integrals in float64, and what every path promises."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import choices
from diffjax.process import beta_tables, paths, schedules, shifts
from diffjax.process.paths import Coeffs, coeffs, log_snr, time_of_log_snr
from diffjax.spec import build

PATHS = {name: build(spec) for name, spec in choices.PATHS.items()}
EXPLODING = ("ve", "edm")  # a = 1
OTHERS = ("linear", "linear_imm", "linear_shifted", "linear_twice_noise", "brownian_bridge")
PRESERVING = tuple(name for name in PATHS if name not in (*EXPLODING, *OTHERS))
TABLES = ("ddpm_table", "scaled_linear_table", "cosine_table")
every_path = pytest.mark.parametrize("name", PATHS)

# Shifts of log-SNR ask a path for a and s alone: by default on one of each kind.
KINDS = ("linear", "cosine", "ddpm_table", "edm")
# What else is looked at here.
MADE: dict[str, paths.Path] = {
    **{f"{name}, less signal": shifts.LogSNRShift(PATHS[name], 0.5) for name in KINDS},
    "cosine, more signal": shifts.LogSNRShift(PATHS["cosine"], 3.0),
    **{f"{name} to zero": shifts.ZeroTerminalSNR(PATHS[name]) for name in TABLES},
    "short": paths.Linear(t_noise=0.9),
    "short to zero": shifts.ZeroTerminalSNR(paths.Linear(t_noise=0.9)),
    "linear, sooner": shifts.TimeShift(paths.Linear(), 0.5),
    **{f"{name}, later": shifts.TimeShift(PATHS[name], 3.0)
       for name in ("linear", "edm", "cosine", "ve")},
    "published sigmoid": schedules.Sigmoid(-3.0, 2.0, 0.7),
    "cosine table, clipped soon": beta_tables.CosineBetas(max_beta=0.02),
}  # fmt: skip
REST = {
    f"{name}, less signal": shifts.LogSNRShift(path, 0.5)
    for name, path in PATHS.items()
    if name not in KINDS
}
ALL = PATHS | MADE | REST

N = 129  # times in most tests: one program for all paths


def inner_times(name, n=N):
    path = ALL[name]
    return np.linspace(float(path.t_min), float(path.t_noise), n).astype(np.float32)


def _program(some):
    return jax.jit(lambda t: jnp.stack([jnp.stack(coeffs(path, t, ndim=1)) for path in some]))


_PROGRAMS = [(some, _program(some.values())) for some in (PATHS, MADE, REST)]


def scales(name, t):
    """The path and its derivatives at times `t[B]`, computed in the precision of `t`."""
    some, program = next(both for both in _PROGRAMS if name in both[0])
    t = np.asarray(t)
    padded = np.pad(t, (0, -len(t) % N), mode="edge").reshape(-1, N)
    found = [np.asarray(program(each))[list(some).index(name)] for each in padded]
    return Coeffs(*np.concatenate(found, axis=1)[:, : len(t)])


def log_snrs(name, t):
    c = scales(name, t)
    with np.errstate(divide="ignore"):  # where the signal is gone
        return 2.0 * np.log(np.asarray(c.a, np.float64) / np.asarray(c.s, np.float64))


def in_float64(name, t):
    """a and s of a path computed in float64, at times `t[N]`."""
    with jax.enable_x64(True):
        return scales(name, np.asarray(t, np.float64))[1:3]


@every_path
def test_a_path_starts_clean_and_loses_signal(name):
    clean = scales(name, np.zeros(1, np.float32))
    assert clean.a[0] == pytest.approx(1.0, abs=1e-7)
    assert clean.s[0] == 0.0
    assert (np.diff(log_snrs(name, inner_times(name))) < 0).all()


@every_path
def test_derivatives_match_central_differences_over_the_whole_domain(name):
    low, high = float(PATHS[name].t_min), float(PATHS[name].t_noise)
    # Equal steps of time and of its logarithm, off the corners of the tables.
    t = np.concatenate([np.linspace(low, high, 99)[1:-1], np.geomspace(low, high, 34)[1:-1]])
    t = (np.floor(1000.0 * t) + 0.37) / 1000.0
    t = np.clip(t, 1.02 * low, high - 0.003 * (high - low)).astype(np.float32)
    c = scales(name, t)
    h = 1e-5 * t.astype(np.float64)
    (a_up, s_up), (a_down, s_down) = (in_float64(name, t + step) for step in (h, -h))
    # Relative to the fastest change: a' of the cosine path vanishes at one end, s' at the other.
    scale = np.hypot((a_up - a_down) / (2 * h), (s_up - s_down) / (2 * h))
    np.testing.assert_allclose(c.da / scale, (a_up - a_down) / (2 * h) / scale, atol=2e-4)
    np.testing.assert_allclose(c.ds / scale, (s_up - s_down) / (2 * h) / scale, atol=2e-4)


@every_path
def test_float32_keeps_the_digits_of_both_scales(name):
    """Relative errors, so that neither s near clean data nor a near pure noise is lost."""
    t = inner_times(name)
    for mine, exact in zip(scales(name, t)[1:3], in_float64(name, t), strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", PRESERVING)
def test_variance_preserving_paths_preserve_variance(name):
    _, a, s, _, _ = scales(name, inner_times(name))
    if name == "sub_vp":  # Song et al. 2021: its variance is s² = (1 - a²)², not 1 - a²
        s = np.sqrt(s)
    np.testing.assert_allclose(a**2 + s**2, 1.0, atol=1e-6)


@pytest.fixture(scope="module")
def times_found():
    """Times, in two places log-SNRs that are out of range, and what is found for all of them."""

    @jax.jit
    def program(values):
        return jnp.stack(
            [time_of_log_snr(*each) for each in zip(PATHS.values(), values, strict=True)]
        )

    t = {name: inner_times(name) for name in PATHS}
    # Minus infinity, where the signal is gone, is a value.
    values = np.stack([log_snrs(name, t[name]) for name in PATHS])
    values[:, 5:7] = 1e3, -1e3
    found = np.array(program(np.float32(values)))
    return {name: (t[name], row) for name, row in zip(PATHS, found, strict=True)}


@every_path
def test_time_of_log_snr_inverts_log_snr(name, times_found):
    t, found = times_found[name]
    ends = [PATHS[name].t_min, PATHS[name].t_noise]
    np.testing.assert_allclose(found[5:7], ends, rtol=1e-5)
    inside = np.delete(np.arange(N), [5, 6])
    np.testing.assert_allclose(found[inside], t[inside], rtol=1e-4, atol=2e-5)


# Ranges of a path's numbers.
NUMBERS: dict[str, tuple[Any, tuple[tuple[float, float], ...]]] = {
    "sigmoid": (schedules.Sigmoid, ((-4.0, 0.5), (1.0, 4.0), (0.4, 2.0))),
    "ve": (schedules.VarianceExploding, ((0.001, 0.1), (1.0, 500.0))),
    "ddpm": (paths.LinearBeta, ((0.01, 1.0), (2.0, 30.0))),
    "sub_vp": (lambda low, high: schedules.SubVP(low, high, 0.05), ((0.01, 1.0), (2.0, 30.0))),
    "time shift": (lambda shift: shifts.TimeShift(paths.Linear(), shift), ((0.05, 20.0),)),
    "log-SNR": (schedules.LinearLogSNR, ((5.0, 15.0), (-15.0, 2.0))),
    "zero": (lambda end: shifts.ZeroTerminalSNR(paths.Cosine(t_noise=end)), ((0.5, 0.99),)),
}
SHIFTED: dict[str, tuple[Any, tuple[tuple[float, float], ...]]] = {
    name: (lambda scale, path=path: shifts.LogSNRShift(path, scale), ((0.05, 20.0),))
    for name, path in PATHS.items()
}


def test_paths_keep_their_promises_at_other_numbers():
    """At the ends of the ranges above, and at numbers between them."""
    assert_promises(NUMBERS | {f"{name}, shifted": SHIFTED[name] for name in KINDS})


@pytest.mark.thorough
def test_shifted_paths_keep_their_promises():
    assert_promises(SHIFTED)


def assert_promises(ranges_of):
    share = np.random.default_rng(0).uniform(size=(8, 3))
    share[:2] = [[0.0], [1.0]]

    def one(make, *numbers):
        path = make(*numbers)
        inner = path.t_min + jnp.linspace(0.0, 1.0, N) * (path.t_noise - path.t_min)
        t = jnp.concatenate([jnp.zeros(1), jnp.minimum(inner, path.t_noise)])
        return coeffs(path, t, ndim=1)

    @jax.jit
    def program(numbers):
        return {
            name: jax.vmap(partial(one, make))(*numbers[name])
            for name, (make, _) in ranges_of.items()
        }

    numbers = {
        name: [np.float32(low + share[:, i] * (high - low)) for i, (low, high) in enumerate(ranges)]
        for name, (_, ranges) in ranges_of.items()
    }
    for name, (_, a, s, da, ds) in jax.device_get(program(numbers)).items():
        with np.errstate(divide="ignore"):
            log_snr = 2.0 * np.log(a[:, 1:].astype(np.float64) / s[:, 1:].astype(np.float64))
        assert (np.diff(log_snr) < 0).all(), name
        np.testing.assert_allclose(a[:, 0], 1.0, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(s[:, 0], 0.0, err_msg=name)
        # From t_min on: at 0 derivatives may be infinite.
        assert np.isfinite([each[:, 1:] for each in (a, s, da, ds)]).all(), name


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
    _, a, s, _, _ = scales(name, np.float32(np.arange(1, 1001) / 1000.0))
    # The cosine table's last step is clipped: 0.001 of the variance is left of the step before.
    np.testing.assert_allclose(np.asarray(a, np.float64) ** 2, kept, rtol=1e-3)
    np.testing.assert_allclose(np.asarray(s, np.float64) ** 2, 1.0 - kept, rtol=1e-4)


def test_the_cosine_table_is_clipped_where_the_paper_clips():
    betas = published_betas("cosine_table")
    assert betas[-1] == 0.999
    assert betas[-2] < 0.999
    a = scales("cosine_table", np.float32([0.999, 1.0])).a
    assert (a[1] / a[0]) ** 2 == pytest.approx(1e-3, rel=1e-3)
    # A lower clip acts on more steps.
    a = scales("cosine table, clipped soon", np.float32(np.arange(1001) / 1000.0)).a
    a = np.asarray(a, np.float64)
    expected = np.minimum(betas, 0.02)
    np.testing.assert_allclose(1 - (a[1:] / a[:-1]) ** 2, expected, rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("name", TABLES)
def test_between_the_steps_the_rate_of_noise_is_constant(name):
    kept = np.cumprod(1.0 - published_betas(name))
    step = np.array([1, 400, 900])
    a = scales(name, np.float32((step + 0.25) / 1000.0)).a
    np.testing.assert_allclose(a**2, kept[step - 1] ** 0.75 * kept[step] ** 0.25, rtol=1e-3)


def test_linear_beta_is_the_limit_of_the_table():
    # log(1 - b) = -b - b²/2 - …, and b <= 0.02: the logarithms differ by 1 % at most.
    kept = np.cumprod(1.0 - published_betas("ddpm_table"))
    steps = np.array([100, 300, 500, 1000])
    alpha = np.asarray(scales("ddpm", np.float32(steps / 1000.0)).a, np.float64)
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
    t = np.float32(np.arange(1, num + 1) / 1000.0)
    _, a, s, _, _ = (np.asarray(each, np.float64) for each in scales(f"{name} to zero", t))
    assert a[-1] == pytest.approx(0.0, abs=1e-7)
    assert s[-1] == pytest.approx(1.0, abs=1e-6)
    factor = (root[0] - root[-1]) / (root[0] * (1.0 - root[-1]))
    np.testing.assert_allclose(a, factor * published, atol=1e-6)
    np.testing.assert_allclose(a, published, atol=5e-5)  # how much the difference is
    np.testing.assert_allclose(a**2 + s**2, 1.0, atol=1e-6)


@pytest.mark.parametrize("name", TABLES)
def test_rounding_leaves_no_negative_signal(name):
    """A time that rounding moved past the end would have log-SNR nan, and so would its label."""
    end = np.float32(PATHS[name].t_noise)
    c = scales(f"{name} to zero", end + np.float32(np.arange(N) * np.spacing(end)))
    assert (c.a >= 0.0).all()
    assert c.da[0] < -0.01  # and the velocity is not cut off with it


def test_zero_terminal_snr_keeps_the_variance_of_any_path():
    t = inner_times("short")
    before, after = (scales(name, t) for name in ("short", "short to zero"))
    np.testing.assert_allclose(after.a**2 + after.s**2, before.a**2 + before.s**2, rtol=1e-6)
    assert after.a[-1] == pytest.approx(0.0, abs=1e-7)


# Shifts.


@pytest.mark.parametrize(("name", "shift"), [("linear, sooner", 0.5), ("linear, later", 3.0)])
def test_a_time_shift_on_the_linear_path_shifts_log_snr(name, shift):
    t = inner_times(name)
    expected = log_snrs("linear", t) - 2.0 * np.log(shift)
    np.testing.assert_allclose(log_snrs(name, t), expected, atol=5e-5)
    # Esser et al. 2024, equation 23, at one number.
    sigma = scales(name, np.float32([0.25])).s[0]
    assert sigma == pytest.approx(shift * 0.25 / (1 + (shift - 1) * 0.25))


def test_rounding_shifts_no_time_past_the_end():
    """There `a` of the linear path would be negative, log-SNR nan, and sampling starts there."""

    @jax.jit
    @jax.vmap
    def at_the_end(shift):
        path = shifts.TimeShift(paths.Linear(), shift)
        return jax.jvp(path.alpha, (jnp.ones(1),), (jnp.ones(1),))

    shift = np.linspace(0.3, 4.0, 300).astype(np.float32)
    end, slope = at_the_end(shift)
    assert (np.asarray(end) >= 0.0).all()
    np.testing.assert_allclose(slope[:, 0], -1.0 / shift, rtol=1e-5)


@pytest.mark.parametrize("name", ["edm", "cosine", "ve"])
def test_a_time_shift_keeps_the_ends_of_any_path(name):
    ours, theirs = (log_snrs(each, inner_times(each))[[0, -1]] for each in (f"{name}, later", name))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "scale"),
    [*((f"{name}, less signal", 0.5) for name in KINDS), ("cosine, more signal", 3.0)],
)
def test_a_log_snr_shift_is_exact_and_keeps_the_variance(name, scale):
    assert_shifted(name, scale)


@pytest.mark.thorough
def test_a_log_snr_shift_is_so_on_every_path():
    for name in REST:
        assert_shifted(name, 0.5)


def assert_shifted(name, scale):
    plain = name.split(",")[0]
    t = inner_times(plain)
    expected = log_snrs(plain, t) + 2.0 * np.log(scale)
    np.testing.assert_allclose(log_snrs(name, t), expected, atol=3e-5)
    before, after = (scales(each, t) for each in (plain, name))
    np.testing.assert_allclose(after.a**2 + after.s**2, before.a**2 + before.s**2, rtol=1e-6)


# Published definitions of the others.


def test_the_sigmoid_path_is_algorithm_1():
    # Chen 2023 (arXiv:2301.10972), algorithm 1, sigmoid_schedule, without its final clip.
    start, end, tau = -3.0, 2.0, 0.7
    t = np.asarray(inner_times("published sigmoid"), np.float64)
    v = 1.0 / (1.0 + np.exp(-np.array([start, end]) / tau))
    output = 1.0 / (1.0 + np.exp(-(t * (end - start) + start) / tau))
    gamma = (v[1] - output) / (v[1] - v[0])
    c = scales("published sigmoid", np.float32(t))
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
    c = scales(name, np.float32(times[8::8]))
    np.testing.assert_allclose(c.a, a[7::8], rtol=2e-5)
    np.testing.assert_allclose(c.s, s[7::8], rtol=2e-4)


def test_the_log_snr_of_vdm_is_linear_from_end_to_end():
    path = schedules.LinearLogSNR()
    # Below t_min it goes on without a jump.
    t = np.float32([*np.linspace(1e-3, 1.0, 5), 0.999e-3, 0.5e-3])
    expected = [*np.linspace(13.3, -5.0, 5), 13.302, 13.3 + 2 * np.log(2)]
    np.testing.assert_allclose(jax.jit(lambda t: log_snr(path, t))(t), expected, atol=1e-4)


def test_numbers_of_a_path_are_traced():
    """A sweep over a path's numbers is one program, and the schedule has gradients."""

    @jax.jit
    def program(shift, high):
        half = jnp.array(0.5)
        shifted = jax.vmap(lambda shift: shifts.TimeShift(paths.Linear(), shift).sigma(half))
        alpha = lambda high: paths.LinearBeta(beta_max=high).alpha(half)  # noqa: E731
        return shifted(shift), *jax.value_and_grad(alpha)(high)

    shifted, alpha, slope = program(np.float32([1.0, 3.0]), 20.0)
    np.testing.assert_allclose(shifted, [0.5, 0.75], rtol=1e-6)
    assert float(slope) == pytest.approx(-0.25 * 0.25 * float(alpha), rel=1e-5)
