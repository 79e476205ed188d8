"""Solvers against exact flows and exact moments: each is of the order that it declares."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import choices
from diffjax.errors import UserError
from diffjax.evaluation.convergence import mixture_of_four
from diffjax.process import analytic
from diffjax.process.paths import time_of_log_snr
from diffjax.sampling import (
    adams,
    adaptive,
    dpm_solver,
    grids,
    restart,
    runge_kutta,
    sde,
    solvers,
    unipc,
)
from diffjax.sampling.sample import Recipe, integrate
from diffjax.spec import build

PATHS = {name: build(choices.PATHS[name]) for name in ("linear", "ddpm", "edm")}
DETERMINISTIC = {
    "ddim": solvers.ddim(),
    "euler": solvers.euler(),
    "heun": solvers.heun(),
    "ralston": runge_kutta.two_stage(2 / 3),
    "midpoint": runge_kutta.midpoint(),
    "rk4": runge_kutta.rk4(),
    "edm_heun": runge_kutta.edm_heun(),
    "dpmpp_2s": dpm_solver.dpmpp_2s(),
    "dpmpp_2m": dpm_solver.dpmpp_multistep(2),
    "dpmpp_3m": dpm_solver.dpmpp_multistep(3),
    **{f"ab_{order}": adams.ab(order) for order in (1, 2, 3, 4)},
    **{f"lms_{order}": adams.lms(order) for order in (2, 4)},
    **{f"deis_{order}": adams.deis(order) for order in (2, 3)},
    # 4 on EDM's path alone, where σ is the time; on the others the mean of eps over a step is not
    # the one that counts.
    **{f"plms_{order}": adams.plms(order) for order in (1, 2, 4)},
    **{f"exp_ab_{order}": adams.exp_ab(order) for order in (1, 2, 3, 4)},
    **{f"unipc_{order}": unipc.unipc(order) for order in (1, 2, 3)},
    **{f"unipc_{order}_bh1": unipc.unipc(order, unipc.bh1) for order in (1, 2, 3)},
    **{f"unip_{order}": unipc.unipc(order, corrector=False) for order in (1, 2, 3)},
}
STOCHASTIC = {
    "ddim_half": solvers.ddim(eta=0.5),
    "ddpm": solvers.ddpm(),
    "ddpm_large": solvers.ddpm(share=1.0),
    "dpmpp_2m_sde": dpm_solver.dpmpp_multistep(2, eta=1.0),
    "dpmpp_3m_sde": dpm_solver.dpmpp_multistep(3, eta=1.0),
    "sa_1": adams.exp_ab(1, eta=1.0),
    "sa_2": adams.exp_ab(2, eta=1.0),
    "sa_3_half": adams.exp_ab(3, eta=0.5),
    "euler_maruyama": sde.euler_maruyama(),
    "euler_maruyama_constant": sde.euler_maruyama(sde.ConstantRate(0.5)),
    "euler_maruyama_forward": sde.euler_maruyama(sde.ForwardRate()),
    "stochastic_heun": sde.stochastic_heun(),
}
MEAN = np.array([0.8, -0.5])
COVARIANCE = np.array([[0.5, 0.2], [0.2, 0.15]])


def gaussian():
    return analytic.Gaussian(jnp.asarray(MEAN), jnp.asarray(COVARIANCE))


def stepper(solver, path):
    """One compiled step; `noise` is what its random numbers are."""
    predict = gaussian().predict(path)

    @jax.jit
    def step(memory, x, t, t_next, noise):
        def denoise(x, t):
            return predict(x, jnp.full(len(x), t), None)._replace(share=jnp.full_like(x, 0.5))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(solvers, "normal", lambda keys, shape: noise)
            return solver.step(denoise, path, memory, x, t, t_next, noise)

    return step


def levels(path, n):
    """Times from log-SNR -1.6 to 2.4; on every path alike, and not symmetric on any."""
    start, end = (float(time_of_log_snr(path, jnp.float32(level))) for level in (-1.6, 2.4))
    return np.linspace(start, end, n + 1)


def slope(counts, errors):
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


def flow_error(step, solver, path, n, exact_steps=3):
    """After steps that begin on the exact solution, so that multistep solvers have a history."""
    times = levels(path, n)
    x = jnp.asarray([[-1.5, 0.3], [0.2, 1.4], [1.1, -0.7]])
    data = jnp.asarray(MEAN), jnp.asarray(COVARIANCE)
    flow = partial(analytic.gaussian_flow, *data, path, x, times[0])
    memory, now = solver.init(x), x
    for i in range(n):
        if i <= exact_steps:
            now = flow(times[i])
        now, memory = step(memory, now, times[i], times[i + 1], jnp.zeros_like(x))
        if isinstance(memory, unipc._Memory) and i < exact_steps:
            memory = memory._replace(x=flow(times[i]))
    return float(jnp.sqrt(jnp.mean((now - flow(times[-1])) ** 2)))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_error_falls_with_the_declared_order(name):
    solver, counts, slopes = DETERMINISTIC[name], (64, 192), {}
    with jax.enable_x64(True):
        for path_name, path in PATHS.items():
            step = stepper(solver, path)
            slopes[path_name] = slope(counts, [flow_error(step, solver, path, n) for n in counts])
    # On a single path errors may cancel; on none may they be of lower order.
    assert min(slopes.values()) == pytest.approx(solver.order, abs=0.3), slopes


def moment_error(step, solver, path, n):
    """Of mean and covariance, exactly: on a Gaussian, samples are affine in all noises."""
    times = levels(path, n)
    a, s = (np.asarray(of(jnp.asarray(times))) for of in (path.alpha, path.sigma))
    first, last = (a[i] ** 2 * COVARIANCE + s[i] ** 2 * np.eye(2) for i in (0, -1))
    # Row 0 has no noise at all, rows 1 and 2 that of the beginning, two rows more each step's.
    x = np.tile(a[0] * MEAN, (2 * n + 3, 1))
    x[1:3] += np.linalg.cholesky(first).T
    x, noise = jnp.asarray(x), np.zeros((n, 2 * n + 3, 2))
    for i in range(n):
        noise[i, 2 * i + 3 : 2 * i + 5] = np.eye(2)
    memory = solver.init(x)
    for i in range(n):
        x, memory = step(memory, x, times[i], times[i + 1], noise[i])
    deviations = np.asarray(x[1:] - x[0])
    wrong = [np.asarray(x[0]) - a[-1] * MEAN, (deviations.T @ deviations - last).ravel()]
    return np.abs(np.concatenate(wrong)).max()


# Restart adds its noise where times rise; the adaptive ones draw it in another way.
@pytest.mark.parametrize(
    "name", sorted({*choices.SOLVERS} - {"restart", "adaptive", "adaptive_sde"})
)
def test_fresh_noise_is_what_random_numbers_make(name):
    solver, path = build(choices.SOLVERS[name]), PATHS["linear"]
    step, x = stepper(solver, path), jnp.ones((1, 2))
    ends = [step(solver.init(x), x, 0.6, 0.5, jnp.full_like(x, z))[0] for z in (0.0, 1.0)]
    assert (np.abs(ends[0] - ends[1]).max() > 1e-3) == solver.fresh_noise


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_moments_error_falls_with_the_declared_weak_order(name):
    solver, counts, slopes = STOCHASTIC[name], (64, 192), {}
    with jax.enable_x64(True):
        for path_name, path in PATHS.items():
            step = stepper(solver, path)
            slopes[path_name] = slope(counts, [moment_error(step, solver, path, n) for n in counts])
    assert min(slopes.values()) == pytest.approx(solver.order, abs=0.3), slopes


@pytest.mark.parametrize(
    ("solver", "limit"),
    [
        (adams.lms(1), solvers.ddim()),
        (adams.deis(1), solvers.ddim()),
        (adams.exp_ab(1), solvers.ddim()),
        (adams.ab(1), solvers.euler()),
        (adams.plms(1), solvers.ddim()),
        (adams.plms(4), solvers.ddim()),  # its first step
        (runge_kutta.two_stage(1.0), solvers.heun()),
        (adams.exp_ab(1, eta=1.0), solvers.ddpm()),
        (dpm_solver.dpmpp_multistep(2), solvers.ddim()),  # its first step
        (dpm_solver.dpmpp_multistep(3, eta=1.0), solvers.ddpm()),
        (unipc.unipc(3), solvers.ddim()),
        (sde.euler_maruyama(sde.NoiseScale(0.0)), solvers.euler()),
    ],
)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_one_step_of_the_lowest_order_is_a_known_one(solver, limit, path):
    t, t_next = levels(path, 5)[1:3]
    x = jnp.asarray([[-1.5, 0.3], [0.2, 1.4]])
    z = jnp.asarray([[0.4, -0.8], [1.2, 0.1]])
    ends = [stepper(s, path)(s.init(x), x, t, t_next, z)[0] for s in (solver, limit)]
    np.testing.assert_allclose(*ends, rtol=1e-5, atol=1e-5)


def test_an_adaptive_solver_is_as_exact_as_it_is_told_to_be():
    data, path = mixture_of_four(), PATHS["linear"]
    predict = data.predict(path)
    keys = jax.random.split(jax.random.key(0), 64)
    x = jax.random.normal(jax.random.key(1), (64, 2))
    exact = data.flow(path, x, path.t_noise, path.t_min)

    def denoise(x, t):
        return predict(x, jnp.full(len(x), t), None)

    def end(solver, x):
        times = Recipe(solver, grids.Power(), 3).times(path)
        return integrate(denoise, solver, path, times[:-1], keys[: len(x)], x)

    worst = []
    for tolerance in (1e-2, 1e-4):
        solver = adaptive.adaptive(tolerance)
        worst.append(float(jnp.abs(end(solver, x) - exact).max()))
        # Another batch has other steps: the same sample within tolerance.
        np.testing.assert_allclose(end(solver, x[:5]), exact[:5], atol=30 * tolerance)
    assert worst[1] < min(3e-3, 0.1 * worst[0])
    assert not np.isfinite(end(adaptive.adaptive(1e-6, max_steps=3), x)).any()


def test_restart_walks_its_interval_again():
    path = PATHS["linear"]
    solver = restart.restart(solvers.ddim(), low=0.3, high=1.0, times=2, num_steps=3)
    times = np.asarray(Recipe(solver, grids.Power(), 5).times(path))
    # σ = t/(1 - t): at most 0.3 from t = 0.23 on, which is 0.2 on this grid; 1 is t = 0.5.
    plain = [1.0, 0.8, 0.6, 0.4, 0.2]
    np.testing.assert_allclose(times[:5], plain, atol=1e-6)
    np.testing.assert_allclose(times[5::4][:2], 0.5, atol=1e-5)
    np.testing.assert_allclose(times[8::4], 0.2, atol=1e-6)
    assert len(times) == 5 + 2 * 4 + 1
    assert times[-1] == 0.0
    inside = times[5:9] / (1 - times[5:9])
    np.testing.assert_allclose(inside[1:] / inside[:-1], inside[1] / inside[0], rtol=1e-3)
    with pytest.raises(UserError, match="give low < high"):
        restart.restart(solvers.ddim(), low=2.0)


def test_restart_shrinks_the_error_that_was_there():
    """Samples that are too wide by half: noise is added to their variance, and the flow scales it.

    Of `σ² + 1` at the low level, the flow of standard normal data makes `(σ² + 1)` times the ratio
    of the two levels' variances.
    """
    path, n = PATHS["edm"], 20_000
    predict = analytic.Gaussian(jnp.zeros(1), jnp.eye(1)).predict(path)
    solver = restart.restart(runge_kutta.edm_heun(), low=0.1, high=2.0, times=1, num_steps=40)
    low, high = 0.1, 2.0
    x = 1.5 * jnp.sqrt(1 + low**2) * jax.random.normal(jax.random.key(0), (n, 1))
    levels = np.exp(np.linspace(np.log(high), np.log(low), 41))
    times = jnp.asarray(np.concatenate([[low], levels]), jnp.float32)

    def denoise(x, t):
        return predict(x, jnp.full(len(x), t), None)

    keys = jax.random.split(jax.random.key(1), n)
    end = integrate(denoise, solver, path, times, keys, x)
    up = 1.5**2 * (1 + low**2) + high**2 - low**2
    expected = np.sqrt(up / (1 + high**2) * (1 + low**2))
    assert float(end.std()) == pytest.approx(expected, rel=0.02)
    assert expected < 1.15 * np.sqrt(1 + low**2)  # of 1.5 times


def test_resampling_visits_each_stretch_again():
    solver = restart.resampled(solvers.ddim(), jump=2, times=2)
    times = Recipe(solver, grids.Power(), 5).times(PATHS["linear"])
    expected = [1.0, 0.8, 0.6, 1.0, 0.8, 0.6, 0.4, 0.2, 0.6, 0.4, 0.2, 0.0]
    np.testing.assert_allclose(times, expected, atol=1e-6)
    assert Recipe(solver, grids.Power(), 5).nfe == 8 + 1
