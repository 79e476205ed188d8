"""Solvers against exact flows and exact moments: each is of the order that its steps have."""

from contextlib import contextmanager
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from diffjax import choices
from diffjax.compiling import once
from diffjax.process.paths import Pair, time_of_log_snr
from diffjax.sampling import adams, dpm_solver, runge_kutta, sde, solvers, unipc
from diffjax.sampling.solvers import Interval
from diffjax.spec import build
from tests.support.any_path import numbered
from tests.support.normals import Normals

PATHS = {name: build(spec) for name, spec in choices.PATHS.items()}
# No two of the three numbers a, s and t are linear in one another here, so that nothing cancels.
GENERIC = "ddpm"
# Where it is not seen there: the lower order of SA with half of the noise shows at more steps.
SEEN = {"sa_3_half": "linear"}
THREE = ("linear", "ddpm", "edm")
# Between the entries of a table the velocity has corners: no order above 1 can be expected.
SMOOTH = [name for name in PATHS if "table" not in name]
# One program for them all, of which the path is an argument.
NUMBERED = numbered({name: PATHS[name] for name in SMOOTH})

# Every row of the table is measured, but for: the flow map, consistency and one step,
# which are exact; restart, which adds
# its noise where times rise; the churn of EDM's, which adds more noise the more steps there are;
# the adaptive ones, whose steps are their own; and SA of order 3, which its first steps alone hold
# at the 2 that it declares: so few steps show more.
OTHERS = {
    "flow_map", "consistency", "one_step", "restart", "edm_heun_churn", "adaptive", "adaptive_sde",
    "sa",
}  # fmt: skip
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
MEASURED = ROWS | VARIANTS
# One of each family: these are measured on every smooth path as well.
FAMILIES = ("ddim", "heun", "dpmpp_2m", "unipc", "ab")


def measured(fresh_noise):
    return [name for name, solver in MEASURED.items() if solver.fresh_noise == fresh_noise]


# What is declared is the order from inside the path on (test_orders_inside.py), where the first
# steps of those that look back count. Of a step that has all its history it is p, and one more with
# a corrector.
WITH_HISTORY = {
    "deis": 3, "lms": 4, "exp_ab": 3, "unipc_3": 4, "unipc_3_bh1": 4, "unip_3": 3, "ab_3": 3,
    "ab_4": 4, "exp_ab_4": 4,
}  # fmt: skip


def order_of(name):
    return WITH_HISTORY.get(name, MEASURED[name].order)


COUNTS = (64, 111, 192)
EXACT = 4  # steps that begin on the exact solution, so that multistep solvers have a history
STARTS = np.array([[-1.5, 0.3], [0.2, 1.4], [1.1, -0.7]])
NORMAL = Normals(np.array([0.8, -0.5]), np.array([0.05, 0.6]))
# Two normals for each of the numbers, near enough that the flow is smooth on a grid of 64 steps.
SHARES = np.array([0.4, 0.6])[:, None, None]
MEANS = np.array([[0.7, -0.3], [-0.5, 0.4]])[:, None]
VARIANCES = np.array([[0.5, 0.15], [0.3, 0.5]])[:, None]


def of_the_mixture(path, x, t):
    """Its best denoiser: what each of the normals predicts, by how likely it is."""
    a, s = path.alpha(t), path.sigma(t)
    spread, centred = a**2 * VARIANCES + s**2, x[None] - a * MEANS
    likely = jax.nn.softmax(jnp.log(SHARES) - 0.5 * (jnp.log(spread) + centred**2 / spread), axis=0)
    white = likely * centred / spread
    x0 = jnp.sum(likely * MEANS + a * VARIANCES * white, axis=0)
    return Pair(x0, s * jnp.sum(white, axis=0), 0.5)


def flow_of_the_mixture(a, s):
    """Of STARTS at the first of the scales, at all: each number keeps its quantile."""

    def below(i, x, column):
        deviations = np.sqrt(a[i] ** 2 * VARIANCES[:, 0, column] + s[i] ** 2)
        return SHARES[:, 0, 0] @ scipy.stats.norm.cdf(x, a[i] * MEANS[:, 0, column], deviations)

    def moved(i, row, column):
        quantile = below(0, STARTS[row, column], column)
        far = 10.0 * (a[i] + s[i])
        return scipy.optimize.brentq(
            lambda x: below(i, x, column) - quantile, -far, far, xtol=1e-14, rtol=1e-15
        )

    rows, columns = map(range, STARTS.shape)
    return np.array([[[moved(i, r, c) for c in columns] for r in rows] for i in range(len(a))])


@contextmanager
def noise_is_given():
    """The random numbers of a step are its keys themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers, "normal", lambda keys, shape: keys)
        yield


@once()
def _ends(path):
    return time_of_log_snr(path, jnp.array([-1.6, 2.4]))


@cache
def ends(name):
    """Times of log-SNR -1.6 and 2.4: alike on all paths, and not symmetric on any."""
    with jax.enable_x64(True):
        return np.asarray(_ends(NUMBERED[name]), np.float64)


def levels(name, n):
    return np.linspace(*ends(name), n + 1)


@once()
def _scales(path, times):
    return path.alpha(times), path.sigma(times)


def scales(name, times):
    """The path at `EXACT + 1` times or fewer, in float64."""
    times = np.asarray(times, np.float64)
    more = np.pad(times, (0, EXACT + 1 - len(times)), mode="edge")
    with jax.enable_x64(True):
        return [of[: len(times)] for of in jax.device_get(_scales(NUMBERED[name], more))]


@cache
def exact_of(name):
    """`n -> (times, exact)`: at the first steps of each count, and at the end."""

    def of(n):
        times = levels(name, n)
        return times, flow_of_the_mixture(*scales(name, [*times[:EXACT], times[-1]]))

    return {n: of(n) for n in COUNTS}


def slope(errors):
    return -np.polyfit(np.log(COUNTS), np.log(errors), 1)[0]


def slopes_on(paths, solver):
    """Of the errors at the end: one program for all counts of steps, and for paths of one kind."""

    @once()
    def walk(path, times, n, exact):
        def body(i, state):
            x, memory = state
            begin = exact[jnp.minimum(i, EXACT - 1)]
            x = jnp.where(i < EXACT, begin, x)
            interval = Interval(path, times[i], times[i + 1], jnp.zeros_like(x))
            x, memory = solver.step(partial(of_the_mixture, path), interval, memory, x)
            if isinstance(memory, unipc._Memory):
                memory = memory._replace(x=jnp.where(i < EXACT - 1, begin, memory.x))
            return x, memory

        return jax.lax.fori_loop(0, n, body, (exact[0], solver.init(exact[0])))[0]

    def error(path, n, times, exact):
        end = walk(path, np.pad(times, (0, COUNTS[-1] - n)), n, exact)
        return np.sqrt(np.mean((np.asarray(end) - exact[-1]) ** 2))

    return {
        name: slope([error(path, n, *both) for n, both in exact_of(name).items()])
        for name, path in paths.items()
    }


def affine_walk(solver, rows):
    """A walk of normal data, of which each row after the second has the noise of one step alone."""

    @once()
    def walk(path, times, n, x):
        def denoise(x, t):
            return NORMAL.pair(path, x, t)._replace(share=0.5)

        def body(i, state):
            x, memory = state
            # One row is each step's: it has its noise, and no other.
            noise = jnp.where(jnp.arange(rows) == i + 2, 1.0, 0.0)[:, None] * jnp.ones_like(x)
            return solver.step(denoise, Interval(path, times[i], times[i + 1], noise), memory, x)

        with noise_is_given():
            x, _ = jax.lax.fori_loop(0, n, body, (x, solver.init(x)))
            return x, denoise(x, times[n]).x0

    return walk


def moments_slopes_on(paths, solver):
    """Of mean and variance, exactly: on normal data, samples are affine in all noises."""
    rows = COUNTS[-1] + 2
    walk = affine_walk(solver, rows)

    def error(name, path, n):
        times = levels(name, n)
        a, s = scales(name, times[[0, -1]])
        first, last = (a[i] ** 2 * NORMAL.variance + s[i] ** 2 for i in (0, 1))
        # Row 0 has no noise at all, row 1 that of the beginning.
        x = np.tile(a[0] * NORMAL.mean, (rows, 1))
        x[1] += np.sqrt(first)
        x = np.asarray(walk(path, np.pad(times, (0, COUNTS[-1] - n)), n, x)[0])
        variance = np.square(x[1:] - x[0]).sum(0)
        return np.abs([x[0] - a[1] * NORMAL.mean, variance - last]).max()

    return {name: slope([error(name, path, n) for n in COUNTS]) for name, path in paths.items()}


def slopes(name, names):
    solver = MEASURED[name]
    found = moments_slopes_on if solver.fresh_noise else slopes_on
    # A single path as itself, whose program is shorter.
    paths = NUMBERED if len(names) > 1 else PATHS
    with jax.enable_x64(True):
        return found({path_name: paths[path_name] for path_name in names}, solver)


# One option of each solver, beside the rows, is measured by default.
OPTIONS = (
    "unipc_3_bh1", "ralston", "ddim_half", "sa_3_half", "euler_maruyama_constant",
    "euler_maruyama_forward",
)  # fmt: skip


def quick(names):
    """Of which the other options are thorough."""
    return [
        pytest.param(
            name,
            marks=[] if name in (*ROWS, *OPTIONS) else pytest.mark.thorough(tenth=False),
        )
        for name in names
    ]


@pytest.mark.parametrize("name", quick(measured(fresh_noise=False)))
def test_the_error_falls_with_the_declared_order(name):
    (found,) = slopes(name, [SEEN.get(name, GENERIC)]).values()
    assert found == pytest.approx(order_of(name), abs=0.3)


@pytest.mark.parametrize("name", quick(measured(fresh_noise=True)))
def test_the_moments_error_falls_with_the_declared_weak_order(name):
    (found,) = slopes(name, [SEEN.get(name, GENERIC)]).values()
    assert found == pytest.approx(order_of(name), abs=0.3)


@pytest.mark.parametrize("name", ["sa", "edm_heun_churn", "restart"])
def test_of_many_steps_the_moments_are_exact(name):
    """Of those whose order is not measured; sampling starts from noise without the last signal."""
    path, solver = PATHS["linear"], build(choices.SOLVERS[name])
    with jax.enable_x64(True):
        times = np.append(1.0 - np.arange(400) / 400, 0.0)
        if name == "restart":  # from σ = 0.1 up to 1 and down in four steps, twice
            at = np.argmax(times <= 0.1 / 1.1)
            sigma = np.geomspace(1.0, times[at] / (1.0 - times[at]), 5)
            again = np.tile(sigma / (1.0 + sigma), 2)
            times = np.concatenate([times[: at + 1], again, times[at + 1 :]])
        x = np.zeros((len(times) + 1, 2))
        x[1] = times[0]
        _, x = affine_walk(solver, len(x))(path, times, len(times) - 2, x)
        x = np.asarray(x)
    ends = np.array([times[0], 0.0])
    mean, edge = NORMAL.flow(1.0 - ends, ends, times[0] * np.array([[0.0] * 2, [1.0] * 2]))[1]
    np.testing.assert_allclose(x[0], mean, atol=0.03)
    np.testing.assert_allclose(np.square(x[1:] - x[0]).sum(0), np.square(edge - mean), atol=0.03)


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("name", MEASURED)
def test_on_no_path_is_the_order_lower(name):
    """On single ones errors may cancel."""
    found = slopes(name, SMOOTH if name in FAMILIES else THREE)
    assert min(found.values()) == pytest.approx(order_of(name), abs=0.3), found


def test_fresh_noise_is_what_random_numbers_make():
    """Where times fall: restart adds its noise where they rise, and the adaptive ones their own."""
    rows = {
        name: build(spec)
        for name, spec in choices.SOLVERS.items()
        if name not in {"restart", "adaptive", "adaptive_sde"}
    }
    path, x, times = PATHS["linear"], jnp.ones((1, 2)), jnp.array([0.6, 0.5])

    @jax.jit
    def ends(noise):
        # Of a flow map's two times, where it begins.
        denoise = lambda x, t: NORMAL.pair(path, x, jnp.ravel(t)[0])._replace(share=0.5)  # noqa: E731
        with noise_is_given():
            return {
                name: solver.step(denoise, Interval(path, *times, noise), solver.init(x), x)[0]
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
    path = PATHS[GENERIC]
    x, z = jnp.asarray(STARTS[:2]), jnp.asarray([[0.4, -0.8], [1.2, 0.1]])

    @jax.jit
    def ends(t, t_next):
        denoise = partial(of_the_mixture, path)
        with noise_is_given():
            return {
                name: [s.step(denoise, Interval(path, t, t_next, z), s.init(x), x)[0] for s in pair]
                for name, pair in pairs.items()
            }

    for name, (found, known) in ends(*levels(GENERIC, 5)[1:3]).items():
        np.testing.assert_allclose(found, known, rtol=1e-5, atol=1e-5, err_msg=name)


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
    exact = jnp.asarray(flow_of_the_mixture(*scales("edm", times))[:-1], jnp.float32)
    walked = {id(s): s for *pair, _ in pairs.values() for s in pair}

    @jax.jit
    def all_ends(times):
        denoise = partial(of_the_mixture, path)

        def along(solver):
            def body(memory, at):
                x, t, t_next = at
                interval = Interval(path, t, t_next, jnp.zeros(2))
                end, memory = solver.step(denoise, interval, memory, x)
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
    """If one evaluation returns 1 and the others 0, a step shows its weight."""
    path, times = PATHS["linear"], np.linspace(0.9, 0.4, 6)
    solver, zero = adams.plms(order), jnp.zeros((1, 1))
    span = times[5] - times[4] * (1.0 - times[5]) / (1.0 - times[4])  # s' - s·a'/a

    @jax.jit
    def last(said, times):
        def body(memory, i):
            eps = jnp.full((1, 1), i == said, jnp.float32)
            pair = Pair(-times[i] / (1.0 - times[i]) * eps, eps)  # of x = 0
            interval = Interval(path, times[i], times[i + 1], jnp.zeros(1))
            end, memory = solver.step(lambda x, t: pair, interval, memory, zero)
            return memory, end

        return jax.lax.scan(body, solver.init(zero), jnp.arange(5))[1][-1, 0, 0]

    weights = [
        float(last(said, jnp.asarray(times, jnp.float32))) / span
        for said in range(4, 4 - order, -1)
    ]
    published = {2: [1.5, -0.5], 4: np.array([55.0, -59.0, 37.0, -9.0]) / 24.0}
    np.testing.assert_allclose(weights, published[order], rtol=1e-4)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_noise_of_any_eta_keeps_the_level_of_noise(order):
    """Data are one point, 0: `x ~ N(0, s²)` at each time, so a step is `c·x + d·z` with
    `c²·s² + d² = s'²`.
    """
    solver = solvers.ddim(0.4) if order == 1 else dpm_solver.dpmpp_multistep(order, 0.4)
    path = build(choices.PATHS["cosine"])
    keys = jax.random.split(jax.random.key(0), 1)
    interval = Interval(path, jnp.array(0.7), jnp.array(0.4), keys)

    def denoise(x, t):
        return Pair(jnp.zeros_like(x), x / interval.begin.s)

    @jax.jit
    def steps(x):
        there, back = (solver.step(denoise, interval, solver.init(x), x)[0] for x in (x, -x))
        z = solvers.normal(keys, x.shape[1:])
        return (there - back) / 2, (there + back) / 2 / z, interval.begin.s, interval.end.s

    c, d, s, s_next = steps(np.ones((1, 2, 2, 1), "f"))
    np.testing.assert_allclose((c * s) ** 2 + d**2, np.full(c.shape, s_next**2), rtol=1e-5)
    assert np.all(np.abs(d) > 0.01)


def test_the_forward_rate_is_that_of_ddpm():
    """On a path with `a² + s² = 1`, the forward SDE is `dx = -½·β·x·dt + √β·dw`: `ȧ = -½·β·a`."""
    path = build(choices.PATHS["cosine"])
    c = Interval(path, jnp.array(0.3), jnp.array(0.2), jnp.zeros(0)).coeffs
    np.testing.assert_allclose(sde.ForwardRate(0.5)(c), 0.5 * -2.0 * c.da / c.a, rtol=1e-5)
