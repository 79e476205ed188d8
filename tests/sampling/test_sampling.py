"""Walks, grids and guidance against exact flows, exact moments and counted calls."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import choices
from diffjax.conditions import Classes
from diffjax.oracle import analytic
from diffjax.process import paths
from diffjax.process.paths import Pair
from diffjax.process.precond import Meaning, Precond, TimeLabel, denoiser
from diffjax.process.targets import Clean
from diffjax.sampling import grids, solvers
from diffjax.sampling.guidance import GuidanceModels, guide
from diffjax.sampling.sample import (
    Recipe,
    count_padded,
    draw,
    integrate,
    padded,
    sample,
    sample_padded,
    starting_noise,
    trace,
    with_condition,
)
from diffjax.sampling.sample import _walk_padded as walk_padded
from diffjax.sampling.solvers import Interval
from diffjax.spec import build
from tests.support.normals import Normals
from tests.support.numbered_paths import numbered

PATHS = {name: build(spec) for name, spec in choices.PATHS.items()}
SOLVERS = {name: build(spec) for name, spec in choices.SOLVERS.items()}
GRIDS = {name: build(spec) for name, spec in choices.GRIDS.items()}
# One that ends in pure noise, and does so by a table; one that does not; one of much noise.
KINDS = ("ddpm_table_zero_snr", "scaled_linear_table", "edm")

NORMAL = Normals(np.array([0.8, -0.5]), np.array([0.5, 0.3]))
GAUSSIAN = analytic.Gaussian(jnp.asarray(NORMAL.mean), jnp.diag(jnp.asarray(NORMAL.variance)))
POINT = jnp.array([0.3, -0.6])


def bound(predict):
    return lambda x, t: predict(x, jnp.broadcast_to(t, (len(x), *t.shape)), None)


def predicting(path):
    """The best denoiser of `NORMAL`, as a model."""
    return lambda x, t, cond: NORMAL.pair(path, x, t[:, None])


def ending(path):
    """The end of the flow of `NORMAL`, as a consistency model."""

    def predict(x, t, cond):
        a, s = path.alpha(t)[:, None], path.sigma(t)[:, None]
        mean, variance = NORMAL.mean[None], NORMAL.variance[None]
        deviation = jnp.sqrt(a**2 * variance + s**2)
        end = mean + (x - a * mean) / deviation * np.sqrt(variance)
        return Pair(end, (x - a * end) / s)

    return predict


# What every solver promises of its samples

LENGTH = 513  # of all times, with zeros behind them


def even_times(solver, path, n):
    """Those of a uniform grid along the solver's route, by NumPy."""
    t = np.float32(path.t_noise) * (1.0 - np.arange(n, dtype=np.float32) / n)
    grid = np.append(np.maximum(t, np.float32(path.t_min)), np.float32(0.0))
    return np.asarray(solver.route(path, grid))


def walker(solver, names, n):
    """A walk as one program, and the calls of the model in it.

    Which of the paths, whether the data are one point, the times and the keys are its arguments.
    """
    among, asked = numbered([PATHS[name] for name in names]), []

    def start_and_end(*walk):
        end, memory = walk_padded(*walk)  # as `sample_padded`, and what adaptive solvers count
        return walk[-1], end, memory if solver.nfe is None else 0

    @jax.jit
    def walk(number, is_point, times, keys):
        path = among(number)
        exact = {
            Meaning.POSTERIOR_MEAN: predicting(path),
            Meaning.AVERAGE_VELOCITY: GAUSSIAN.predict(path),
            Meaning.END_OF_FLOW: ending(path),
        }[solver.needs]

        def predict(x, t, cond):
            jax.debug.callback(lambda: asked.append(len(x)))
            begin = t.reshape(len(x), -1)[:, :1]  # of a flow map's two times, where it begins
            eps = (x - path.alpha(begin) * POINT[None]) / path.sigma(begin)
            point = Pair(jnp.broadcast_to(POINT, x.shape), eps)
            pair = jax.tree.map(partial(jnp.where, is_point), point, exact(x, t, cond))
            return pair._replace(share=jnp.full_like(x, 0.3))  # as DDPM's learned variance asks

        noise, keys = starting_noise(keys, (2,))
        x = path.sigma(times[0]) * noise
        return start_and_end(with_condition(predict, None), solver, path, times, keys, x)

    keys = jax.random.split(jax.random.key(0), n)

    def run(name, times, is_point=False, keys=keys):
        asked.clear()
        start, end, counted = walk(
            names.index(name), is_point, np.pad(times, (0, LENGTH - len(times))), keys
        )
        jax.effects_barrier()
        if solver.nfe is None:
            assert len(asked) == int(counted) + 1
        return np.asarray(start), np.asarray(end, np.float64), len(asked)

    return run, keys


@cache
def scales_at_ends(path_name):
    """a and s at `t_noise` and at 0."""
    path = PATHS[path_name]
    scales = jax.jit(lambda t: (path.alpha(t), path.sigma(t)))
    return jax.device_get(scales(np.array([path.t_noise, 0.0], np.float32)))


def assert_exact(solver, path_name, start, end):
    """Where the exact flow carries samples from noise to data, and what becomes of all noise.

    Sampling starts from noise without the last signal: 0.07 of it on Stable Diffusion's table. The
    exact flow is affine, so it carries N(0, s²) to a Gaussian whose mean is short of NORMAL's.
    """
    a, s = scales_at_ends(path_name)
    middle, far = np.zeros((1, 2)), np.full((1, 2), float(s[0]))
    (mean, edge), exact = (
        NORMAL.flow(a, s, np.concatenate([middle, far]))[1],
        NORMAL.flow(a, s, start)[1],
    )
    if not solver.fresh_noise:
        np.testing.assert_allclose(end, exact, atol=0.03, err_msg=path_name)
        return
    covariance = np.diag(np.square(edge - mean))
    # The statistical errors are 0.011 (mean) and 0.011 (variance) of 4,096 samples. DDPM's variance
    # is 10 % short at 100 steps and, being of first order, 2.5 % (0.012) at 400.
    few = 4.0 / np.sqrt(len(end)) if len(end) < 4096 else 0.0
    errors = few * np.sqrt(np.diag(covariance)), few * np.sqrt(2.0) * np.diag(covariance).max()
    for found, known, error in zip(
        (end.mean(0), np.cov(end.T)), (mean, covariance), errors, strict=True
    ):
        assert (np.abs(found - known) < 0.03 + error).all(), (path_name, found, known)


def assert_keys_and_ends(name, run, keys, names):
    """Samples in five steps; returns these and their initial noise."""
    solver, path = SOLVERS[name], PATHS[names[0]]
    times = even_times(solver, path, 5)
    start, end, made = run(names[0], times)
    if solver.nfe is not None:
        assert made == Recipe(solver, grids.Power(), 5).nfe
    # The same keys in other places, among others.
    half = len(keys) // 2
    other = jax.random.split(jax.random.key(7), half)
    _, again, _ = run(names[0], times, keys=jnp.concatenate([other, keys[:half][::-1]]))
    # Where the batch decides on the steps, within what they may be wrong by.
    tolerance = {"adaptive": 1e-3, "adaptive_sde": 0.2}.get(name, 1e-5)
    np.testing.assert_allclose(again[half:], end[:half][::-1], atol=tolerance)

    # Where the data is one point, one is where every sample ends, exactly; adaptive steps are the
    # same for all numbers of them.
    counts = (1, 5) if solver.nfe is not None else (5,)
    for path_name, n in itertools.product(names, counts):
        _, at_point, _ = run(path_name, even_times(solver, PATHS[path_name], n), is_point=True)
        expected = np.broadcast_to(POINT, at_point.shape)
        np.testing.assert_array_equal(at_point, expected, f"{path_name}, {n}")
    return start, end


# One of each kind: fresh noise or none, a cost or a route of its own, one or several steps back.
WALKED = (
    "ddim", "ddpm_learned", "flow_map", "consistency", "heun", "dpmpp_2m_sde", "unipc", "restart",
    "adaptive",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in WALKED else pytest.mark.thorough(tenth=False))
        for name in SOLVERS
    ],
)
def test_samples_have_their_own_keys_the_declared_cost_and_no_noise_left(name):
    """And end where they should: one program, in which all else is arguments.

    Without fresh noise each is where the exact flow ends; with it, they have the exact moments, to
    the precision of few samples. test_solvers.py has the moments without the samples' error.
    """
    solver, names = SOLVERS[name], ("linear",)
    run, keys = walker(solver, names, 64)
    walked = assert_keys_and_ends(name, run, keys, names)
    if solver.nfe is not None:
        walked = run(*names, even_times(solver, PATHS[names[0]], 400))[:2]
    assert_exact(solver, *names, *walked)


def test_a_step_asks_the_model_as_often_as_is_declared():
    path, x, keys = PATHS["linear"], np.zeros((2, 3), "f"), jax.random.split(jax.random.key(0), 2)

    def calls(solver):
        asked = []

        def denoise(x, t):
            asked.append(t)
            return Pair(x, x, x)

        def step(x, t, t_next, keys):
            return solver.step(denoise, Interval(path, t, t_next, keys), solver.init(x), x)

        jax.eval_shape(step, x, np.float32(0.5), np.float32(0.4), keys)
        return len(asked)

    fixed = {name: solver for name, solver in SOLVERS.items() if solver.nfe is not None}
    del fixed["pndm"]  # of whose first step and others both are traced: the next test
    assert {name: calls(solver) for name, solver in fixed.items()} == {
        name: solver.nfe for name, solver in fixed.items()
    }


def test_pndm_evaluates_once_more_than_it_has_steps():
    solver, path, asked = SOLVERS["pndm"], PATHS["linear"], []
    x, times = np.zeros((2, 3), "f"), np.linspace(0.9, 0.1, 5, dtype="f")

    def denoise(x, t):
        asked.append(float(t))
        return Pair(x, x, x)

    memory, keys = solver.init(x), jax.random.split(jax.random.key(0), 2)
    with jax.disable_jit():
        for t, t_next in itertools.pairwise(times):
            x, memory = solver.step(denoise, Interval(path, t, t_next, keys), memory, x)
    np.testing.assert_allclose(asked, [0.9, 0.7, 0.7, 0.5, 0.3], rtol=1e-6)
    assert solver.steps(4) * solver.nfe == len(asked) == 5
    assert solver.steps(0) == 0


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "path_name"),
    [
        ("ddpm", "ddpm"), ("euler_maruyama", "linear"), ("adaptive_sde", "linear"),
        ("sa", "linear"), ("edm_heun_churn", "linear"), ("restart", "linear"),
    ],
)  # fmt: skip
def test_samples_drawn_with_fresh_noise_have_the_exact_moments(name, path_name):
    """By another path, in continuous time, with steps of its own, and of solvers of their own."""
    solver = SOLVERS[name]
    run, _ = walker(solver, (path_name,), 4096)
    times = even_times(solver, PATHS[path_name], 400)
    assert_exact(solver, path_name, *run(path_name, times)[:2])


def assert_right_on(name, names):
    solver = SOLVERS[name]
    run, keys = walker(solver, names, 64)
    assert_keys_and_ends(name, run, keys, names)
    if solver.route is SOLVERS["ddim"].route and not solver.fresh_noise:
        among = numbered([PATHS[name] for name in names])
        times = jax.jit(lambda number: grids.UniformLogSNR()(among(number), 200))
        for number, path_name in enumerate(names):
            assert_exact(solver, path_name, *run(path_name, np.asarray(times(number)))[:2])


@pytest.mark.thorough(tenth=False)
def test_on_paths_of_each_kind_samples_keep_their_keys_and_end_without_noise():
    assert_right_on("ddim", KINDS)


@pytest.mark.thorough
def test_on_every_path_samples_keep_their_keys_and_end_without_noise():
    """Solvers that differ in what they ask of a path: levels, derivatives, a history, a route."""
    for name in ("ddpm", "heun", "unipc", "restart"):
        assert_right_on(name, tuple(PATHS))


def guided_calls(name, scale, walk):
    """The number of rows on which a guided model is evaluated for one sample, and the samples."""
    path, rows_seen = paths.Linear(), []

    def predict(x, t, cond):
        jax.debug.callback(lambda: rows_seen.append(len(x)))
        return predicting(path)(x, t, cond)

    recipe = Recipe(SOLVERS[name], grids.Power(), num_steps=7, guidance_scale=scale)
    times, keys = recipe.times(path), jax.random.split(jax.random.key(0), 3)
    times = padded(times) if walk is count_padded else times

    @jax.jit
    def run(keys, labels):
        guided = guide(
            GuidanceModels(predict, Classes(1)),
            path,
            scale=None if scale == 1.0 else jnp.float32(scale),
        )
        noise, keys = starting_noise(keys, (2,))
        x = path.sigma(times[0]) * noise
        return walk(with_condition(guided, labels), recipe.solver, path, times, keys, x)

    result = run(keys, jnp.zeros(3, jnp.int32))
    jax.effects_barrier()
    return recipe, sum(rows_seen) / 3, result


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_doubles_the_declared_evaluations_which_are_those_made(scale):
    recipe, rows, _ = guided_calls("heun", scale, sample)
    assert rows == recipe.nfe == (6 * 2 + 1) * (1 if scale == 1.0 else 2)


def test_what_a_solver_counts_is_counted_with_the_last_prediction():
    def step(denoise, interval, memory, x):
        return x, memory + 3

    counting = solvers.Solver(lambda x: jnp.zeros((), jnp.int32), step, nfe=None, order=1)
    path, keys = paths.Linear(), jax.random.split(jax.random.key(0), 2)
    times = padded(jnp.array([1.0, 0.75, 0.5, 0.25, 0.0]))
    denoise = bound(predicting(path))
    assert count_padded(denoise, counting, path, times, keys, jnp.ones((2, 2))) == 3 * 3 + 1
    assert Recipe(counting, grids.Power(), 4).nfe is None


@pytest.mark.thorough
def test_an_adaptive_solver_counts_its_evaluations():
    recipe, rows, counted = guided_calls("adaptive", 3.0, count_padded)
    assert recipe.nfe is None
    assert rows == int(counted) * recipe.calls > 10 * recipe.calls


def test_ddim_is_euler_in_the_noise_to_signal_ratio():
    path = paths.LinearBeta()
    denoise = jax.jit(bound(predicting(path)))
    x = np.random.default_rng(0).standard_normal((5, 2)).astype("f")
    times = np.linspace(0.9, 0.2, 8, dtype="f")
    a, s = (np.asarray(of(times), np.float64) for of in (path.alpha, path.sigma))
    expected = x
    for i in range(7):
        # d(x/a) = eps · d(s/a), stepped by hand.
        eps = np.asarray(denoise(np.float32(expected), times[i]).eps)
        expected = a[i + 1] * (expected / a[i] + eps * (s[i + 1] / a[i + 1] - s[i] / a[i]))
    keys = jax.random.split(jax.random.key(1), 5)
    result = integrate(denoise, solvers.ddim(), path, jnp.asarray(times), keys, jnp.asarray(x))
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_the_ancestral_step_draws_from_the_posterior():
    """Mean and variance of q(x' | x, x0) from Bayes' rule, against one step's draws."""
    path, t, t_next = paths.LinearBeta(), 0.5, 0.45
    a, s = float(path.alpha(jnp.float32(t))), float(path.sigma(jnp.float32(t)))
    a_n, s_n = float(path.alpha(jnp.float32(t_next))), float(path.sigma(jnp.float32(t_next)))
    # x = (a/a')·x' + noise of variance q², x' ~ N(a'·x0, s'²): two Gaussian facts about x'.
    ratio, q2 = a / a_n, s**2 - (a / a_n * s_n) ** 2
    x, x0 = 0.4, -0.7
    variance = 1.0 / (ratio**2 / q2 + 1.0 / s_n**2)
    mean = variance * (ratio * x / q2 + a_n * x0 / s_n**2)

    n = 100_000
    denoise = lambda x, t: Pair(jnp.full_like(x, x0), (x - a * x0) / s)  # noqa: E731
    step = jax.jit(partial(solvers.ddpm().step, denoise))
    keys = jax.random.split(jax.random.key(0), n)
    interval = Interval(path, jnp.float32(t), jnp.float32(t_next), keys)
    draws, _ = step(interval, (), jnp.full((n, 1), x))
    draws = np.asarray(draws, np.float64)
    assert draws.mean() == pytest.approx(mean, abs=5 * np.sqrt(variance / n))
    assert draws.var() == pytest.approx(variance, rel=5 * np.sqrt(2 / n))


def test_the_variance_is_between_the_posteriors_and_the_forward_steps():
    path, t, t_next = PATHS["linear"], 0.6, 0.5
    a, s, a_n, s_n = 1.0 - t, t, 1.0 - t_next, t_next
    forward = s**2 - (a / a_n * s_n) ** 2  # of x given x'
    posterior = 1.0 / (1.0 / s_n**2 + (a / a_n) ** 2 / forward)  # of x' given x and x0
    n, how = 100_000, Precond(Clean(), TimeLabel())

    @jax.jit
    def variances(share, keys):
        def apply(params, x, noise_label, cond, *, key=None):
            says = jnp.broadcast_to(2.0 * share - 1.0, x.shape)
            return jnp.concatenate([jnp.zeros_like(x), says], axis=-1)

        def drawn(solver, learned):
            predict = denoiser(apply, (), path, how, learned_variance=learned)
            x = jnp.zeros((n, 1))
            interval = Interval(path, jnp.float32(t), jnp.float32(t_next), keys)
            return solver.step(bound(predict), interval, (), x)[0].var()

        return {
            "learned": drawn(solvers.ddpm_learned(), True),
            "given": drawn(solvers.ddpm(share), False),
        }

    keys = jax.random.split(jax.random.key(0), n)
    for share in (0.0, 0.3, 1.0):
        expected = posterior ** (1.0 - share) * forward**share
        for name, found in variances(jnp.float32(share), keys).items():
            assert float(found) == pytest.approx(expected, rel=5 * np.sqrt(2 / n)), (name, share)


@pytest.mark.parametrize(
    "name",
    [
        "ddpm",
        *(pytest.param(n, marks=pytest.mark.thorough(tenth=False)) for n in ("unipc", "restart")),
    ],
)
def test_padding_changes_no_sample_and_a_trace_is_of_the_same_samples(name):
    path, n, solver = paths.Cosine(), 6, SOLVERS[name]
    predict, times = predicting(path), Recipe(solver, grids.Power(), n).times(path)
    n = len(times) - 1

    @jax.jit
    def walks(keys):
        noise, keys = starting_noise(keys, (2,))
        start = (keys, path.sigma(times[0]) * noise)
        walk = (bound(predict), solver, path)
        traced = trace(*walk, times, *start)
        x0 = jax.vmap(lambda x, t: bound(predict)(x, t).x0)(traced.x[:-1], times[:-1])
        return sample(*walk, times, *start), sample_padded(*walk, padded(times), *start), traced, x0

    plain, with_zeros, traced, x0 = walks(jax.random.split(jax.random.key(0), 3))
    np.testing.assert_allclose(with_zeros, plain, atol=1e-6)
    assert traced.x.shape == (n + 1, 3, 2)
    assert traced.x0.shape == (n, 3, 2)
    np.testing.assert_array_equal(traced.times, times)
    np.testing.assert_allclose(traced.x[-1], plain, atol=1e-6)
    np.testing.assert_allclose(traced.x0, x0, atol=1e-6)


FALLING = [name for name in GRIDS if name != "leading"]


@cache
def grids_on(names, *counts):
    """Times of all grids on each of the paths, by one program: `{n: {grid: {path: times}}}`."""
    among = numbered([PATHS[name] for name in names])

    @jax.jit
    def times(number):
        path = among(number)
        return {n: {name: GRIDS[name](path, n) for name in FALLING} for n in counts}

    each = [jax.device_get(times(number)) for number, _ in enumerate(names)]
    return {
        n: {grid: {name: t[n][grid] for name, t in zip(names, each, strict=True)}
            for grid in FALLING}
        for n in counts
    }  # fmt: skip


def assert_falls(times, n):
    for name, t in times.items():
        assert t.shape == (n + 1,)
        assert t[0] == np.float32(PATHS[name].t_noise), name
        assert t[-1] == 0.0, name
        assert t[-2] >= np.float32(PATHS[name].t_min), name
        assert (np.diff(t) < (0 if n < 1000 else 1e-6)).all(), name


def test_leading_steps_begin_below_the_noise():
    """Steps 901, 801 … 1 of 1,000: the last hundred, which have the most noise, are left out."""
    times = grids.Leading()(paths.Linear(), 10)
    np.testing.assert_allclose(times, [*np.arange(0.902, 0, -0.1), 0.0], rtol=1e-5)


def test_trailing_steps_are_those_of_a_table_of_a_thousand():
    """A third of 1,000 steps is no whole number of them: 1000, 667, 333."""
    times = grids.Trailing()(paths.Linear(), 3)
    np.testing.assert_allclose(times, [1.0, 0.667, 0.333, 0.0], rtol=1e-6)


@pytest.mark.parametrize("grid", FALLING)
def test_grids_fall_from_noise_to_clean(grid):
    assert_falls(grids_on(KINDS, 10)[10][grid], 10)
    assert_falls(grids_on(("linear",), 1)[1][grid], 1)


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("grid", FALLING)
def test_on_every_path_many_steps_fall_too(grid):
    for n, times in grids_on(tuple(PATHS), 2, 1000).items():
        assert_falls(times[grid], n)


def test_the_log_snr_grid_is_even_in_log_snr():
    among = numbered([PATHS[name] for name in KINDS])
    levels = jax.jit(lambda number, t: paths.log_snr(among(number), t))
    for number, (name, t) in enumerate(grids_on(KINDS, 10)[10]["log_snr"].items()):
        steps = np.diff(levels(number, t[1:-1]))
        np.testing.assert_allclose(steps, steps[0], rtol=2e-2, err_msg=name)


def test_another_guidance_scale_does_not_recompile():
    path = paths.Linear()
    times = grids.Power()(path, 3)
    traced = []

    @jax.jit
    def run(keys, scale):
        traced.append(1)
        labels = jnp.zeros(len(keys), jnp.int32)
        predict = guide(GuidanceModels(predicting(path)), path, scale=scale)
        return draw(with_condition(predict, labels), solvers.euler(), path, times, keys, (2,))

    keys = jax.random.split(jax.random.key(0), 2)
    for scale in (1.5, 2.0, 4.0):
        run(keys, jnp.float32(scale))
    assert len(traced) == 1
