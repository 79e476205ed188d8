"""Targets: one network output means one (x0, eps), and it is as precise as float32 allows.

How much an error of the prediction, in units of the target's size, is magnified at worst (measured
here, over the whole domain of each path as it is by default):

    noise, scores   in x0   s/a at t_noise   ve 50, edm 80, ddpm 152, cosine 637, shifted 1,273
    clean           in eps  a/s at t_min     ddpm 95, edm 500, cosine 637, ve 763, linear 999
    velocity        in x0   below 1.5, but s where a does not change: ve 50, edm 80
    v, F            in x0 and eps, below 1.2 everywhere

So float32 keeps at least three digits everywhere, and bfloat16 none where it is above 256.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import choices
from diffjax.errors import UserError
from diffjax.process import paths, schedules, targets
from diffjax.process.paths import Coeffs, Pair, coeffs, mix
from diffjax.process.precond import (
    LogSNRLabel,
    Precond,
    TimeLabel,
    UnitVariance,
    Unscaled,
    denoiser,
    interval_inputs,
)
from diffjax.spec import build
from tests.support.crosses import ILLEGAL

PATHS = {name: build(spec) for name, spec in choices.PATHS.items()}
TARGETS = {name: build(spec) for name, spec in choices.TARGETS.items()}
every_path = pytest.mark.parametrize("path_name", PATHS)
N, SIZE = 129, 16


def whole_domain(path):
    """Both ends and, in between, times near each of them."""
    middle = np.linspace(float(path.t_min), float(path.t_noise), N - 32)
    low = np.geomspace(float(path.t_min), float(path.t_noise), 34)[1:-1]
    return np.sort(np.concatenate([middle, low])).astype(np.float32)


TIMES = np.stack([whole_domain(path) for path in PATHS.values()])


@jax.jit
def _of_every_path(t, pair):
    """The coefficients, the noisy images and their derivatives, at times `t[P, N]`."""

    def one(path, t):
        noisy = lambda t: mix(coeffs(path, t, ndim=2), pair)  # noqa: E731
        return coeffs(path, t, ndim=2), *jax.jvp(noisy, (t,), (jnp.ones_like(t),))

    each = [one(*both) for both in zip(PATHS.values(), t, strict=True)]
    return jax.tree.map(lambda *each: jnp.stack(each), *each)


PAIR = Pair(*np.random.default_rng(0).standard_normal((2, N, SIZE)).astype(np.float32))


@cache
def everywhere():
    """`Coeffs`, `x_t` and `dx_t/dt` of each path over its whole domain, `[N, …]` each."""
    found = jax.device_get(_of_every_path(TIMES, PAIR))
    return {name: jax.tree.map(lambda x, i=i: x[i], found) for i, name in enumerate(PATHS)}


@jax.jit
def round_trip(c, pair):
    """What every target's rounded prediction is decoded to, `[2, T, N, …]`, by precision."""
    results = []
    for dtype in (jnp.float32, jnp.bfloat16):
        mixes = [target(c) for target in TARGETS.values()]
        x_t = mix(c, pair).astype(dtype).astype(jnp.float32)
        predictions = [targets.encode(k, pair).astype(dtype).astype(jnp.float32) for k in mixes]
        decoded = [targets.decode(c, k, p, x_t) for k, p in zip(mixes, predictions, strict=True)]
        results.append(jax.tree.map(lambda *each: jnp.stack(each), *decoded))
    return results, jnp.stack([jnp.stack(target(c)) for target in TARGETS.values()])


@every_path
def test_every_target_decodes_to_the_same_pair(path_name):
    """To the last bit that the rounding of prediction and x_t leaves, at every time."""
    c = everywhere()[path_name][0]
    results, mixes = jax.device_get(round_trip(c, PAIR))
    c, pair = (jax.tree.map(lambda x: np.asarray(x, np.float64), each) for each in (c, PAIR))
    for decoded, unit in zip(results, (8 * 2.0**-24, 1.01 * 2.0**-8), strict=True):
        for i, name in enumerate(TARGETS):
            if (path_name, name) in ILLEGAL:
                continue
            k_x, k_e = np.asarray(mixes[i], np.float64)
            prediction = abs(k_x * pair.x0) + abs(k_e * pair.eps)
            x_t = abs(c.a * pair.x0) + abs(c.s * pair.eps)
            d = abs(k_x * c.s - k_e * c.a)
            x0_error = abs(np.asarray(decoded.x0[i], np.float64) - pair.x0)
            eps_error = abs(np.asarray(decoded.eps[i], np.float64) - pair.eps)
            assert (x0_error <= unit * (c.s * prediction + abs(k_e) * x_t) / d).all(), name
            assert (eps_error <= unit * (abs(k_x) * x_t + c.a * prediction) / d).all(), name


def log_snr_at_ends(path_name):
    """Of scales whose digits float32 keeps (test_paths.py)."""
    c = everywhere()[path_name][0]
    with np.errstate(divide="ignore"):
        return np.ravel(2 * (np.log(np.float64(c.a)) - np.log(np.float64(c.s))))[[0, -1]]


@jax.jit
def worst(c):
    """The largest errors of x0 and of the noise, `[T, 2]`, for predictions that are 1 off."""
    zero = jnp.zeros((N, 1))

    def one(k):
        wrong = targets.decode(c, k, jnp.hypot(k.k_x, k.k_e) + zero, zero)
        return jnp.stack([jnp.max(jnp.abs(each)) for each in wrong[:2]])

    return jnp.stack([one(target(c)) for target in TARGETS.values()])


@every_path
def test_how_ill_conditioned_each_target_is(path_name):
    """The table at the head of this file, from the pair that a wrong prediction decodes to."""
    first, last = log_snr_at_ends(path_name)
    in_x0 = dict.fromkeys(("noise", "score", "scaled_score"), np.exp(-last / 2))
    in_eps = {"clean": np.exp(first / 2)}
    if path_name in ("ve", "edm", "brownian_bridge"):
        in_x0["velocity"] = in_x0["velocity_to_data"] = np.exp(-last / 2)
    if (
        path_name == "linear_twice_noise"
    ):  # x = (1 - t)·x0 + 2t·eps: x0 is x at t=0, less t·√(1 + 2²)
        in_x0["velocity"] = in_x0["velocity_to_data"] = np.sqrt(5)
    found = np.asarray(worst(everywhere()[path_name][0]))
    for name, (worst_x0, worst_eps) in zip(TARGETS, found, strict=True):
        if (path_name, name) in ILLEGAL:
            continue
        if name in in_x0:
            assert worst_x0 == pytest.approx(in_x0[name], rel=1e-2)
        elif name not in ("clean", "noise", "score", "scaled_score"):
            assert worst_x0 < 1.5
        if name in in_eps:
            assert worst_eps == pytest.approx(in_eps[name], rel=1e-2)
        else:
            assert worst_eps < 1.5


@every_path
def test_velocity_is_the_derivative_of_x_t(path_name):
    """Derivatives of a and s are compared with central differences in test_paths.py."""
    c, _, by_jvp = everywhere()[path_name]
    velocity = targets.encode(targets.Velocity()(c), PAIR)
    scale = np.hypot(c.da, c.ds)
    np.testing.assert_allclose(velocity / scale, by_jvp / scale, atol=1e-5)


# Published targets.


def one_time(path, t):
    return coeffs(path, jnp.array([t]), ndim=1)


def test_v_is_the_published_one():
    v = targets.encode(
        targets.V()(one_time(paths.Cosine(), 0.3)), Pair(jnp.array([0.7]), jnp.array([-1.1]))
    )
    angle = 0.15 * np.pi  # Salimans & Ho 2022: v = cos(angle) eps - sin(angle) x
    np.testing.assert_allclose(v, np.cos(angle) * -1.1 - np.sin(angle) * 0.7, rtol=1e-6)


def test_the_score_is_the_gradient_of_the_log_density():
    c = one_time(PATHS["ddpm"], 0.4)
    pair = Pair(jnp.array([0.7]), jnp.array([-1.1]))
    x_t = mix(c, pair)
    log_density = lambda x: jnp.sum(-0.5 * jnp.square((x - c.a * pair.x0) / c.s))  # noqa: E731
    score = targets.encode(targets.Score()(c), pair)
    np.testing.assert_allclose(score, jax.grad(log_density)(x_t), rtol=1e-5)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_f_is_edms_preconditioning(sigma_data):
    """Karras et al. 2022, table 1: D(x) = c_skip·x + c_out·F(c_in·x), in float64."""
    with jax.enable_x64(True):
        path = schedules.EDM(0.002, 80.0)
        sigma = np.geomspace(0.002, 80.0, 25)
        c = coeffs(path, jnp.asarray(sigma), ndim=1)
        rng = np.random.default_rng(0)
        x0, noise = sigma_data * rng.standard_normal(25), rng.standard_normal(25)
        x = x0 + sigma * noise
        total = sigma**2 + sigma_data**2
        c_skip, c_out = sigma_data**2 / total, sigma * sigma_data / np.sqrt(total)
        k = targets.F(sigma_data)(c)
        encoded = targets.encode(k, Pair(jnp.asarray(x0), jnp.asarray(noise)))
        np.testing.assert_allclose(encoded, (x0 - c_skip * x) / c_out, rtol=1e-9, atol=1e-9)
        output = rng.standard_normal(25)
        decoded = targets.decode(c, k, jnp.asarray(output), jnp.asarray(x))
        np.testing.assert_allclose(decoded.x0, c_skip * x + c_out * output, rtol=1e-10, atol=1e-9)
        precond = Precond(targets.F(sigma_data), LogSNRLabel(-0.125), UnitVariance(sigma_data))
        scaled, label = precond.inputs(c, jnp.asarray(x))
        np.testing.assert_allclose(scaled, x / np.sqrt(total), rtol=1e-12)
        np.testing.assert_allclose(label, np.log(sigma) / 4.0, rtol=1e-10, atol=1e-12)  # c_noise
        # The default label is 200 times that.
        label = Precond(targets.F(), LogSNRLabel()).inputs(c, jnp.asarray(x))[1]
        np.testing.assert_allclose(label, 50.0 * np.log(sigma), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["cosine", "ddpm", "sigmoid"])
def test_f_of_unit_data_is_minus_v_where_variance_is_preserved(name):
    c = everywhere()[name][0]
    f, v = targets.F(1.0)(c), targets.V()(c)
    np.testing.assert_allclose(f.k_x, -v.k_x, atol=2e-6)
    np.testing.assert_allclose(f.k_e, -v.k_e, atol=2e-6)


@every_path
def test_f_and_the_scaled_input_have_unit_variance(path_name):
    """Exactly so for data of two values, +-sigma_data, taken with every quantile of the noise."""
    sigma_data = 0.5
    c = everywhere()[path_name][0]
    # Two values of the noise, +-1, have the variance of the normal.
    pair: Any = Pair(*np.array([[[0.5, 0.5, -0.5, -0.5]], [[1.0, -1.0, 1.0, -1.0]]], np.float32))
    f = targets.encode(targets.F(sigma_data)(c), pair)
    scaled, _ = Precond(targets.V(), TimeLabel(), UnitVariance(sigma_data)).inputs(c, mix(c, pair))
    for each in (f, scaled):
        np.testing.assert_allclose(np.mean(np.square(each), axis=1), 1.0, rtol=2e-6)
        np.testing.assert_allclose(np.mean(each, axis=1), 0.0, atol=1e-6)


# Noise labels and what samplers see.


@every_path
@pytest.mark.parametrize("name", choices.NOISE_LABELS)
def test_noise_labels_are_finite_and_rise_or_fall_to_noise(path_name, name):
    label = np.ravel(build(choices.NOISE_LABELS[name])(everywhere()[path_name][0]))
    label = -label if name == "time_to_data" else label
    assert np.isfinite(label).all()
    assert (np.diff(label) >= 0).all()
    # No two times look alike, but for those beyond the limit of log-SNR.
    assert (np.diff(label)[(np.abs(label[1:]) < 499.0)] > 0).all()


def test_labels_and_scales_are_what_they_say_where_nothing_is_given():
    c = everywhere()["edm"][0]
    np.testing.assert_allclose(TimeLabel()(c), 1000.0 * c.t, rtol=1e-6)
    np.testing.assert_allclose(TimeLabel(-1.0, 1.0)(c), 1.0 - c.t, rtol=1e-6)
    np.testing.assert_allclose(LogSNRLabel()(c), 50.0 * np.log(c.t), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(UnitVariance()(c), (0.25 + c.t**2) ** -0.5, rtol=1e-6)
    # Log-SNR is minus infinity where the signal is gone, and the label stays finite.
    end = everywhere()["linear"][0]
    assert float(LogSNRLabel()(end)[-1, 0]) == 500.0


def test_the_domain_decides_legality():
    assert targets.undecodable(paths.Linear(t_noise=0.999), targets.Noise()) is None
    reason = targets.undecodable(paths.Cosine(t_noise=1.0), targets.Noise())
    assert reason is not None
    assert "t=1" in reason
    reason = targets.undecodable(paths.Linear(t_min=0.0), targets.Clean())
    assert reason is not None
    assert "sigma=0" in reason


@dataclass(frozen=True)
class Straight:
    """`a = a0 + a1·t` and `s = s0 + s1·t`, from `t_min` to `t_noise`."""

    a: tuple[float, float]
    s: tuple[float, float]
    t_min: float = 0.0
    t_noise: float = 1.0

    def alpha(self, t):
        return self.a[0] + self.a[1] * t

    def sigma(self, t):
        return self.s[0] + self.s[1] * t


@pytest.mark.parametrize(
    "path",
    [
        # From noise to data, against time: sigma/alpha rises from t_min to t_noise.
        Straight((0.1, 0.9), (1.0, -0.9), t_min=1.0, t_noise=0.0),
        # Both are at least 0, and the noise falls.
        Straight((1.0, 0.0), (1.0, -0.5)),
        # sigma/alpha rises, from below 0.
        Straight((1.0, 0.0), (-0.5, 1.0)),
        # No signal at all, hence no sigma/alpha that could fall.
        Straight((0.0, 0.0), (0.1, 0.9)),
    ],
    ids=["against time", "falls", "negative", "no signal"],
)
def test_a_path_that_leads_from_no_data_to_no_noise_is_refused(path):
    """Each of the three things that a path has to be, where the other two are right."""
    with pytest.raises(UserError, match="does not lead from data to noise"):
        targets.undecodable(path, targets.V())


@pytest.mark.parametrize("path_name", ["cosine", "edm"])
def test_samplers_see_one_pair_whatever_was_trained(path_name):
    """`denoiser` undoes target and input scale, and ignores further outputs such as a variance."""
    path = PATHS[path_name]
    t = whole_domain(path)[1:-1:18]
    pair: Any = Pair(*np.random.default_rng(0).standard_normal((2, len(t), 2, 2, 3), np.float32))

    @jax.jit
    def program(t, pair):
        c = coeffs(path, t, ndim=4)
        x_t = mix(c, pair)
        asked, found, shares = [], [], []
        for target in TARGETS.values():
            precond = Precond(target, LogSNRLabel(), UnitVariance())

            def apply(params, x, noise_label, cond, *, key=None, target=target):
                asked.append((x, noise_label))
                output = targets.encode(target(c), pair)
                return jnp.concatenate([output, 7.0 * jnp.ones_like(output)], axis=-1)

            found.append(denoiser(apply, None, path, precond)(x_t, t, None)[:2])
            if target is TARGETS["v"]:
                both = denoiser(apply, None, path, precond, learned_variance=True)(x_t, t, None)
                found.append(both[:2])
                shares.append(both.share)
        return x_t * UnitVariance()(c), jnp.ravel(LogSNRLabel()(c)), asked, found, shares

    scaled, label, asked, found, (share,) = program(t, pair)
    # An output of -1 is the smallest variance, one of 1 the largest; here it is 7.
    np.testing.assert_array_equal(share, np.full(pair.x0.shape, 4.0))
    for x, noise_label in asked:
        np.testing.assert_allclose(x, scaled, rtol=1e-5)
        np.testing.assert_allclose(noise_label, label, rtol=1e-6)
    for x0, eps in found:
        # One unit in the last place, magnified by at most 640.
        np.testing.assert_allclose(x0, pair.x0, atol=1e-3)
        np.testing.assert_allclose(eps, pair.eps, atol=1e-3)


@pytest.mark.parametrize(("dims", "shape"), [(1, (2,)), (4, (2, 1, 1, 1))])
def test_coefficients_broadcast_in_one_place(dims, shape):
    c = coeffs(paths.Linear(), jnp.array([0.25, 0.5]), ndim=dims)
    assert {each.shape for each in c} == {shape}
    assert isinstance(c, Coeffs)


def test_a_network_of_two_times_sees_the_label_and_its_difference():
    t, t_to = np.array([0.5, 0.9, 0.75], np.float32), np.array([0.25, 0.15, 0.75], np.float32)
    x = np.ones((3, 2, 2, 1), np.float32)
    shown, labels = interval_inputs(
        paths.Linear(), Precond(targets.Velocity(), TimeLabel()), x, t, t_to
    )
    np.testing.assert_array_equal(shown, x)
    expected = [[500.0, 250.0], [900.0, 750.0], [750.0, 0.0]]
    np.testing.assert_allclose(labels, expected, rtol=1e-6)


def test_preconditionings_are_those_of_edms_table():
    """Denoised images `c_skip·x + c_out·F` and inputs of Karras et al. 2022, table 1, by NumPy.

    Of variance preserving paths the network's input is `x_t`, which is `x/√(σ² + 1)` there.
    """
    random, sigma = np.random.default_rng(0), np.array([0.03, 0.5, 7.0])
    x, predicted = random.normal(size=(2, 3, 4)) * [[[1.0]], [[0.3]]]
    x *= np.hypot(sigma, 0.5)[:, None]
    beta = {"d": 19.9, "min": 0.1}
    t_vp = np.sqrt(beta["min"] ** 2 + 2 * beta["d"] * np.log1p(sigma**2)) - beta["min"]
    label = {name: build(choices.NOISE_LABELS[name]) for name in ("log_sigma", "log_half_sigma")}
    vp, edm = PATHS["ddpm"], PATHS["edm"]
    cases = {
        "vp": (targets.Noise(), TimeLabel(999.0), Unscaled(), vp, t_vp / beta["d"]),
        "ve": (targets.ScaledScore(), label["log_half_sigma"], Unscaled(), edm, sigma),
        "edm": (targets.F(), label["log_sigma"], UnitVariance(), edm, sigma),
    }
    c_skip = {"vp": 1.0, "ve": 1.0, "edm": 0.25 / (sigma**2 + 0.25)}
    c_out = {"vp": -sigma, "ve": sigma, "edm": 0.5 * sigma / np.hypot(sigma, 0.5)}
    c_in = {"vp": 1 / np.hypot(sigma, 1), "ve": 1.0, "edm": 1 / np.hypot(sigma, 0.5)}
    c_noise = {"vp": 999 * cases["vp"][-1], "ve": np.log(sigma / 2), "edm": np.log(sigma) / 4}
    for name, (target, noise_label, scale, path, t) in cases.items():
        precond = Precond(target, noise_label, scale)

        @jax.jit
        def both(t, x, f, path=path, precond=precond):
            c = coeffs(path, t, 2)
            seen = precond.inputs(c, c.a * x)
            return *seen, targets.decode(c, precond.target(c), f, c.a * x).x0

        seen, labels, x0 = both(*(np.asarray(each, "f") for each in (t, x, predicted)))
        skip, out, into = (np.broadcast_to(k[name], 3)[:, None] for k in (c_skip, c_out, c_in))
        np.testing.assert_allclose(x0, skip * x + out * predicted, rtol=2e-4, atol=1e-5)
        np.testing.assert_allclose(seen, into * x, rtol=2e-4)
        np.testing.assert_allclose(labels, c_noise[name], rtol=2e-4, atol=1e-4)
