"""Solvers against exact flows and exact moments: each is of the order that it declares."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import choices
from diffjax.process import analytic
from diffjax.process.paths import Pair, time_of_log_snr
from diffjax.sampling import adams, dpm_solver, runge_kutta, sde, solvers, unipc
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
    # Of order 4 on EDM's path alone, where σ is the time; on others it does not run evenly.
    **{f"plms_{order}": adams.plms(order) for order in (1, 2, 4)},
    **{f"exp_ab_{order}": adams.exp_ab(order) for order in (1, 2, 3, 4)},
    **{f"unipc_{order}": unipc.unipc(order) for order in (1, 2, 3)},
    **{f"unipc_{order}_bh1": unipc.unipc(order, unipc.BH1()) for order in (1, 2, 3)},
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
STARTS = [[-1.5, 0.3], [0.2, 1.4], [1.1, -0.7]]
COVARIANCE = np.array([[0.5, 0.2], [0.2, 0.15]])


def gaussian():
    return analytic.Gaussian(jnp.asarray(MEAN), jnp.asarray(COVARIANCE))


def mixture():
    """Two Gaussians near enough that the flow between them is smooth on a grid of 64 steps."""
    return analytic.GaussianMixture(
        jnp.asarray([0.4, 0.6]), jnp.asarray([[0.7, -0.3], [-0.5, 0.4]]),
        jnp.asarray([COVARIANCE, 0.5 * np.eye(2)]),
    )  # fmt: skip


def stepper(solver, path, data=gaussian):
    """One compiled step; `noise` is what its random numbers are."""
    predict = data().predict(path)

    @jax.jit
    def step(memory, x, t, t_next, noise):
        def denoise(x, t):
            return predict(x, jnp.broadcast_to(t, (len(x), *t.shape)), None)._replace(
                share=jnp.full_like(x, 0.5)
            )

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


def gaussian_flow(path, t):
    data = jnp.asarray(MEAN), jnp.asarray(COVARIANCE)
    return analytic.gaussian_flow(*data, path, jnp.asarray(STARTS), levels(path, 1)[0], t)


@cache
def mixture_flow(path, t):
    return mixture().flow(path, jnp.asarray(STARTS), float(levels(path, 1)[0]), float(t))


def flow_error(step, solver, path, n, exact_flow=gaussian_flow, exact_steps=3):
    """After steps that begin on the exact solution, so that multistep solvers have a history."""
    times, x, flow = levels(path, n), jnp.asarray(STARTS), partial(exact_flow, path)
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


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_error_on_a_mixture_falls_no_slower(name):
    solver, path, counts = DETERMINISTIC[name], PATHS["linear"], (64, 192)
    with jax.enable_x64(True):
        step = stepper(solver, path, mixture)
        errors = [flow_error(step, solver, path, n, mixture_flow) for n in counts]
    assert slope(counts, errors) > solver.order - 0.3


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
OTHERS = {"restart", "adaptive", "adaptive_sde"}


@pytest.mark.parametrize("name", sorted({*choices.SOLVERS} - OTHERS))
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


@pytest.mark.parametrize(
    ("solver", "twin", "agree"),
    [
        (unipc.unipc(1, corrector=False), solvers.ddim(), (0, 1, 2, 3)),
        (unipc.unipc(2, corrector=False), dpm_solver.dpmpp_multistep(2), (0, 1, 2, 3)),
        (unipc.unipc(3, corrector=False), dpm_solver.dpmpp_multistep(2), (0, 1)),
        # One parabola goes through three evaluations: the scale B cancels.
        (unipc.unipc(3, corrector=False), adams.exp_ab(3), (0, 2, 3)),
        (unipc.unipc(3, unipc.BH1(), corrector=False), adams.exp_ab(3), (0, 2, 3)),
        (dpm_solver.dpmpp_multistep(3), dpm_solver.dpmpp_multistep(2), (0, 1)),
        # With σ as the time.
        (adams.plms(4), adams.lms(4), (0, 1, 2, 3)),
        (adams.ab(3), adams.lms(3), (0, 1, 2, 3)),
    ],
)
def test_steps_that_agree_and_steps_that_do_not(solver, twin, agree):
    """Along the exact flow, so with the same history, over unequal steps."""
    path, times = PATHS["edm"], np.array([2.2, 1.7, 1.0, 0.8, 0.5])
    data, start = gaussian(), jnp.asarray([[-1.5, 0.3], [0.2, 1.4]])
    predict, memories = data.predict(path), [s.init(start) for s in (solver, twin)]

    def denoise(x, t):
        return predict(x, jnp.broadcast_to(t, (len(x), *t.shape)), None)

    for i in range(4):
        x, ends = data.flow(path, start, times[0], times[i]), []
        t, t_next = jnp.asarray(times[i : i + 2], jnp.float32)
        for k, s in enumerate((solver, twin)):
            end, memories[k] = s.step(denoise, path, memories[k], x, t, t_next, jnp.zeros(2))
            ends.append(end)
        same = np.allclose(ends[0], ends[1], rtol=1e-5, atol=1e-5)
        assert same == (i in agree), i


@pytest.mark.parametrize("order", [2, 4])
def test_the_weights_of_plms_are_the_published_ones(order):
    """Where one evaluation says 1 and the others 0, a step shows its weight."""
    path, times = PATHS["linear"], np.linspace(0.9, 0.4, 6)
    solver, weights = adams.plms(order), []
    span = times[5] - times[4] * (1.0 - times[5]) / (1.0 - times[4])  # s' - s·a'/a
    for said in range(4, 4 - order, -1):
        memory = solver.init(jnp.zeros((1, 1)))
        for i in range(5):
            eps = jnp.full((1, 1), float(i == said))
            pair = Pair(-times[i] / (1.0 - times[i]) * eps, eps)  # of x = 0
            end, memory = solver.step(
                lambda x, t, pair=pair: pair, path, memory, jnp.zeros((1, 1)),
                jnp.float32(times[i]), jnp.float32(times[i + 1]), jnp.zeros(1),
            )  # fmt: skip
        weights.append(float(end[0, 0]) / span)
    published = {2: [1.5, -0.5], 4: np.array([55.0, -59.0, 37.0, -9.0]) / 24.0}
    np.testing.assert_allclose(weights, published[order], rtol=1e-4)
