"""Solvers against exact flows and exact moments: each is of the order that its steps have."""

from contextlib import contextmanager
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import choices
from diffjax.process import analytic
from diffjax.process.paths import Pair, time_of_log_snr
from diffjax.sampling import adams, dpm_solver, runge_kutta, sde, solvers, unipc
from diffjax.spec import build
from tests.support.numbered_paths import numbered

PATHS = {name: build(spec) for name, spec in choices.PATHS.items()}
NUMBER = {name: number for number, name in enumerate(PATHS)}
# On a single path errors may cancel; on none of these may they be of lower order.
THREE = ("linear", "ddpm", "edm")
# Between the entries of a table the velocity has corners: no order above 1 can be expected.
SMOOTH = [name for name in PATHS if "table" not in name]

# Every row of the table is measured, but for: the flow map, which is exact; restart, which adds
# its noise where times rise; the churn of EDM's, which adds more noise the more steps there are;
# the adaptive ones, whose steps are their own; and SA of order 3, which its first steps alone hold
# at the 2 that it declares: so few steps show more.
OTHERS = {"flow_map", "restart", "edm_heun_churn", "adaptive", "adaptive_sde", "sa"}
ROWS = {name: build(spec) for name, spec in choices.SOLVERS.items() if name not in OTHERS}
# What else the arguments of a solver make of it; of order 1 they are DDIM and Euler, step by step.
VARIANTS = {
    "unipc_3_bh1": unipc.unipc(3, unipc.BH1()),
    "unip_3": unipc.unipc(3, corrector=False),
    "ddim_half": solvers.ddim(eta=0.5),
    "sa_2": adams.exp_ab(2, eta=1.0),
    "sa_3_half": adams.exp_ab(3, eta=0.5),
    "euler_maruyama_constant": sde.euler_maruyama(sde.ConstantRate(0.5)),
    "euler_maruyama_forward": sde.euler_maruyama(sde.ForwardRate()),
}
# The same code between these and the rows: they are `thorough`.
MORE_VARIANTS = {
    "ralston": runge_kutta.two_stage(2 / 3),
    **{f"ab_{order}": adams.ab(order) for order in (3, 4)},
    "lms_2": adams.lms(2),
    "deis_2": adams.deis(2),
    # Of order 4 on EDM's path alone, where σ is the time; on others it does not run evenly.
    "plms_2": adams.plms(2),
    **{f"exp_ab_{order}": adams.exp_ab(order) for order in (2, 4)},
    "unipc_1": unipc.unipc(1),
    **{f"unipc_{order}_bh1": unipc.unipc(order, unipc.BH1()) for order in (1, 2)},
    "unip_2": unipc.unipc(2, corrector=False),
}
MEASURED = ROWS | VARIANTS | MORE_VARIANTS
# One of each family: these are measured on every smooth path, in every run of the tests.
FAMILIES = {"ddim", "heun", "dpmpp_2m", "unipc", "ab"}


def measured(fresh_noise):
    return [
        pytest.param(name, marks=pytest.mark.thorough if name in MORE_VARIANTS else [])
        for name, solver in MEASURED.items()
        if solver.fresh_noise == fresh_noise
    ]


# What is declared is the order from inside the path on (test_orders_inside.py), where the first
# steps of those that look back count. Of a step that has all its history it is p, and one more with
# a corrector.
WITH_HISTORY = {
    "deis": 3, "lms": 4, "exp_ab": 3, "unipc_3": 4, "unipc_3_bh1": 4, "unip_3": 3, "ab_3": 3,
    "ab_4": 4, "exp_ab_4": 4,
}  # fmt: skip

COUNTS = (64, 111, 192)
EXACT = 4  # steps that begin on the exact solution, so that multistep solvers have a history
MEAN = np.array([0.8, -0.5])
STARTS = np.array([[-1.5, 0.3], [0.2, 1.4], [1.1, -0.7]])
COVARIANCE = np.array([[0.5, 0.2], [0.2, 0.15]])


def gaussian():
    """As a mixture of two that are the same, so that one program takes either."""
    return analytic.GaussianMixture(
        jnp.full(2, 0.5), jnp.asarray([MEAN, MEAN]), jnp.asarray([COVARIANCE, COVARIANCE])
    )


def mixture():
    """Two Gaussians near enough that the flow between them is smooth on a grid of 64 steps."""
    return analytic.GaussianMixture(
        jnp.asarray([0.4, 0.6]), jnp.asarray([[0.7, -0.3], [-0.5, 0.4]]),
        jnp.asarray([COVARIANCE, 0.5 * np.eye(2)]),
    )  # fmt: skip


def denoiser(data, path):
    predict = data.predict(path)

    def denoise(x, t):
        pair = predict(x, jnp.broadcast_to(t, (len(x), *t.shape)), None)
        return pair._replace(share=jnp.full_like(x, 0.5))

    return denoise


@contextmanager
def noise_is_given():
    """The random numbers of a step are its keys themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers, "normal", lambda keys, shape: keys)
        yield


@cache
def _ends():
    """Times of log-SNR -1.6 and 2.4 on each path: alike on all, and not symmetric on any."""
    path_of, levels = numbered(list(PATHS.values())), jnp.array([-1.6, 2.4])
    solve = jax.jit(jax.vmap(lambda number: time_of_log_snr(path_of(number), levels)))
    return np.asarray(solve(jnp.arange(len(PATHS))), np.float64)


def levels(name, n):
    return np.linspace(*_ends()[NUMBER[name]], n + 1)


def scales(name, times):
    """The path at times, in float64."""
    path, times = PATHS[name], jnp.asarray(times)
    return np.asarray(path.alpha(times))[:, None, None], np.asarray(path.sigma(times))[
        :, None, None
    ]


def gaussian_flow(name, times):
    """Of STARTS at the first of the times, at all of them: an affine map in closed form."""
    (a, s), (variances, vectors) = scales(name, times), np.linalg.eigh(COVARIANCE)
    deviations = np.sqrt(a**2 * variances + s**2)
    whitened = (STARTS - a[0] * MEAN) @ vectors / deviations[0]
    return a * MEAN + (whitened * deviations) @ vectors.T


def mixture_flow(name, times):
    n, many = len(times), np.tile(STARTS, (len(times), 1))
    ends = np.repeat(times, len(STARTS))
    return np.asarray(mixture().flow(PATHS[name], many, times[0], ends)).reshape(n, *STARTS.shape)


@cache
def flow_of(data, name):
    """`n -> (times, exact)`: at the first steps of each count, and at the end."""
    flow = {gaussian: gaussian_flow, mixture: mixture_flow}[data]
    grids = {n: levels(name, n) for n in COUNTS}
    every = np.unique(np.concatenate([[*grid[:EXACT], grid[-1]] for grid in grids.values()]))
    every = every if every[0] == grids[COUNTS[0]][0] else every[::-1]  # from the start on
    exact = flow(name, every)
    where = {time: i for i, time in enumerate(every)}
    return {
        n: (grid, exact[[where[time] for time in (*grid[:EXACT], grid[-1])]])
        for n, grid in grids.items()
    }


def slope(errors):
    return -np.polyfit(np.log(COUNTS), np.log(errors), 1)[0]


def walker(solver, names):
    """One compiled walk for all the named paths, data and counts of steps."""
    path_of = numbered([PATHS[name] for name in names])

    @jax.jit
    def walk(data, number, times, n, exact):
        path = path_of(number)
        denoise = denoiser(data, path)

        def body(i, state):
            x, memory = state
            begin = exact[jnp.minimum(i, EXACT - 1)]
            x = jnp.where(i < EXACT, begin, x)
            x, memory = solver.step(
                denoise, path, memory, x, times[i], times[i + 1], jnp.zeros_like(x)
            )
            if isinstance(memory, unipc._Memory):
                memory = memory._replace(x=jnp.where(i < EXACT - 1, begin, memory.x))
            return x, memory

        return jax.lax.fori_loop(0, n, body, (exact[0], solver.init(exact[0])))[0]

    def slope_of(data, name):
        errors = []
        for n, (times, exact) in flow_of(data, name).items():
            padded = np.pad(times, (0, COUNTS[-1] - n))
            end = walk(data(), names.index(name), padded, n, exact)
            errors.append(np.sqrt(np.mean((np.asarray(end) - exact[-1]) ** 2)))
        return slope(errors)

    return slope_of


def assert_order(name, names):
    """On a Gaussian the order itself, on a mixture none below it."""
    solver = MEASURED[name]
    order = WITH_HISTORY.get(name, solver.order)
    with jax.enable_x64(True):
        slope_of = walker(solver, names)
        slopes = {path_name: slope_of(gaussian, path_name) for path_name in names}
        on_a_mixture = slope_of(mixture, "linear")
    assert min(slopes.values()) == pytest.approx(order, abs=0.3), slopes
    assert on_a_mixture > order - 0.3


@pytest.mark.parametrize("name", measured(fresh_noise=False))
def test_the_error_falls_with_the_order_of_the_steps(name):
    assert_order(name, SMOOTH if name in FAMILIES else THREE)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", [name for name, one in MEASURED.items() if not one.fresh_noise and name not in FAMILIES]
)
def test_the_error_falls_with_the_order_of_the_steps_on_every_smooth_path(name):
    assert_order(name, SMOOTH)


def moment_walker(solver, names):
    """Of mean and covariance, exactly: on a Gaussian, samples are affine in all noises."""
    path_of, rows = numbered([PATHS[name] for name in names]), 2 * COUNTS[-1] + 3

    @jax.jit
    def walk(data, number, times, n, x):
        path = path_of(number)
        denoise = denoiser(data, path)

        def body(i, state):
            x, memory = state
            # Two rows more are each step's: they have its noise, and no other.
            noise = jax.lax.dynamic_update_slice(jnp.zeros_like(x), jnp.eye(2), (2 * i + 3, 0))
            return solver.step(denoise, path, memory, x, times[i], times[i + 1], noise)

        with noise_is_given():
            return jax.lax.fori_loop(0, n, body, (x, solver.init(x)))[0]

    def slope_of(name):
        errors = []
        for n in COUNTS:
            times = levels(name, n)
            a, s = (of[[0, -1], 0, 0] for of in scales(name, times))
            first, last = (a[i] ** 2 * COVARIANCE + s[i] ** 2 * np.eye(2) for i in (0, 1))
            # Row 0 has no noise at all, rows 1 and 2 that of the beginning.
            x = np.tile(a[0] * MEAN, (rows, 1))
            x[1:3] += np.linalg.cholesky(first).T
            padded = np.pad(times, (0, COUNTS[-1] - n))
            x = np.asarray(walk(gaussian(), names.index(name), padded, n, x))
            deviations = x[1:] - x[0]
            wrong = [x[0] - a[1] * MEAN, (deviations.T @ deviations - last).ravel()]
            errors.append(np.abs(np.concatenate(wrong)).max())
        return slope(errors)

    return slope_of


@pytest.mark.parametrize("name", measured(fresh_noise=True))
def test_the_moments_error_falls_with_the_declared_weak_order(name):
    solver = MEASURED[name]
    with jax.enable_x64(True):
        slope_of = moment_walker(solver, THREE)
        slopes = {path_name: slope_of(path_name) for path_name in THREE}
    assert min(slopes.values()) == pytest.approx(solver.order, abs=0.3), slopes


def test_fresh_noise_is_what_random_numbers_make():
    """Where times fall: restart adds its noise where they rise, and the adaptive ones their own."""
    rows = {
        name: build(spec)
        for name, spec in choices.SOLVERS.items()
        if name not in {"restart", "adaptive", "adaptive_sde"}
    }
    path, x, times = PATHS["linear"], jnp.ones((1, 2)), jnp.array([0.6, 0.5])
    alone = analytic.Gaussian(jnp.asarray(MEAN), jnp.asarray(COVARIANCE))

    @jax.jit
    def ends(noise):
        denoise = denoiser(alone, path)
        with noise_is_given():
            return {
                name: solver.step(denoise, path, solver.init(x), x, *times, noise)[0]
                for name, solver in rows.items()
            }

    still, moved = ends(jnp.zeros_like(x)), ends(jnp.ones_like(x))
    for name, solver in rows.items():
        assert (np.abs(still[name] - moved[name]).max() > 1e-3) == solver.fresh_noise, name


def test_one_step_of_the_lowest_order_is_a_known_one():
    pairs = {
        "lms": (adams.lms(1), solvers.ddim()),
        "deis": (adams.deis(1), solvers.ddim()),
        "exp_ab": (adams.exp_ab(1), solvers.ddim()),
        "ab": (adams.ab(1), solvers.euler()),
        "plms": (adams.plms(1), solvers.ddim()),
        "the first step of plms": (adams.plms(4), solvers.ddim()),
        "two_stage": (runge_kutta.two_stage(1.0), solvers.heun()),
        "exp_ab with noise": (adams.exp_ab(1, eta=1.0), solvers.ddpm()),
        "the first step of 2M": (dpm_solver.dpmpp_multistep(2), solvers.ddim()),
        "the first step of 3M": (dpm_solver.dpmpp_multistep(3, eta=1.0), solvers.ddpm()),
        "the first step of unipc": (unipc.unipc(3), solvers.ddim()),
        "no noise": (sde.euler_maruyama(sde.NoiseScale(0.0)), solvers.euler()),
    }
    path_of = numbered([PATHS[name] for name in THREE])
    x, z = jnp.asarray(STARTS[:2]), jnp.asarray([[0.4, -0.8], [1.2, 0.1]])

    @jax.jit
    def ends(number, t, t_next):
        path = path_of(number)
        denoise = denoiser(gaussian(), path)
        with noise_is_given():
            return {
                name: [s.step(denoise, path, s.init(x), x, t, t_next, z)[0] for s in pair]
                for name, pair in pairs.items()
            }

    for number, path_name in enumerate(THREE):
        for name, (found, known) in ends(number, *levels(path_name, 5)[1:3]).items():
            says = f"{name} on {path_name}"
            np.testing.assert_allclose(found, known, rtol=1e-5, atol=1e-5, err_msg=says)


def test_steps_that_agree_and_steps_that_do_not():
    """Along the exact flow, so with the same history, over unequal steps."""
    ddim, two_m = solvers.ddim(), dpm_solver.dpmpp_multistep(2)
    unip_3, exp_ab_3 = unipc.unipc(3, corrector=False), adams.exp_ab(3)
    lms_4 = adams.lms(4)
    pairs = {
        "UniP 1 and DDIM": (unipc.unipc(1, corrector=False), ddim, (0, 1, 2, 3)),
        "UniP 2 and 2M": (unipc.unipc(2, corrector=False), two_m, (0, 1, 2, 3)),
        "UniP 3 and 2M": (unip_3, two_m, (0, 1)),
        # One parabola goes through three evaluations: the scale B cancels.
        "UniP 3 and the exponential one": (unip_3, exp_ab_3, (0, 2, 3)),
        "UniP 3 with B1 and the exponential one": (
            unipc.unipc(3, unipc.BH1(), corrector=False), exp_ab_3, (0, 2, 3),
        ),
        "3M and 2M": (dpm_solver.dpmpp_multistep(3), two_m, (0, 1)),
        # With σ as the time.
        "PLMS and LMS": (adams.plms(4), lms_4, (0, 1, 2, 3)),
        "AB and LMS": (adams.ab(3), adams.lms(3), (0, 1, 2, 3)),
    }  # fmt: skip
    path, times = PATHS["edm"], np.array([2.2, 1.7, 1.0, 0.8, 0.5])
    exact = jnp.asarray(gaussian_flow("edm", times)[:-1], jnp.float32)
    walked = {id(s): s for *pair, _ in pairs.values() for s in pair}

    @jax.jit
    def all_ends(times):
        denoise = denoiser(gaussian(), path)

        def along(solver):
            def body(memory, at):
                x, t, t_next = at
                end, memory = solver.step(denoise, path, memory, x, t, t_next, jnp.zeros(2))
                return memory, end

            return jax.lax.scan(body, solver.init(exact[0]), (exact, times[:-1], times[1:]))[1]

        return {key: along(solver) for key, solver in walked.items()}

    ends = all_ends(jnp.asarray(times, jnp.float32))
    for name, (solver, twin, agree) in pairs.items():
        for i, (found, other) in enumerate(zip(ends[id(solver)], ends[id(twin)], strict=True)):
            same = np.allclose(found, other, rtol=1e-5, atol=1e-5)
            assert same == (i in agree), f"{name}, step {i}"


@pytest.mark.parametrize("order", [2, 4])
def test_the_weights_of_plms_are_the_published_ones(order):
    """Where one evaluation says 1 and the others 0, a step shows its weight."""
    path, times = PATHS["linear"], np.linspace(0.9, 0.4, 6)
    solver, zero = adams.plms(order), jnp.zeros((1, 1))
    span = times[5] - times[4] * (1.0 - times[5]) / (1.0 - times[4])  # s' - s·a'/a

    @jax.jit
    def last(said, times):
        def body(memory, i):
            eps = jnp.full((1, 1), i == said, jnp.float32)
            pair = Pair(-times[i] / (1.0 - times[i]) * eps, eps)  # of x = 0
            end, memory = solver.step(
                lambda x, t: pair, path, memory, zero, times[i], times[i + 1], jnp.zeros(1)
            )
            return memory, end

        return jax.lax.scan(body, solver.init(zero), jnp.arange(5))[1][-1, 0, 0]

    weights = [
        float(last(said, jnp.asarray(times, jnp.float32))) / span
        for said in range(4, 4 - order, -1)
    ]
    published = {2: [1.5, -0.5], 4: np.array([55.0, -59.0, 37.0, -9.0]) / 24.0}
    np.testing.assert_allclose(weights, published[order], rtol=1e-4)
