"""Found grids: the best of all by brute force, costs in closed form, and the command."""

import itertools
import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from configs import digits
from diffjax import choices
from diffjax.compiling import once
from diffjax.errors import UserError
from diffjax.oracle import analytic
from diffjax.process.paths import Cosine, Linear, LinearBeta
from diffjax.runs.samples.found_grids import grid_file, read_grid
from diffjax.sampling import grid_search, runge_kutta, solvers
from diffjax.sampling.sample import sample_padded
from diffjax.sampling.solvers import Interval
from diffjax.spec import build
from diffjax.studies.convergence import mixture_of_four
from experiments import evaluate, find_grid
from experiments import sample as sample_script
from experiments.flags import cli
from tests.support.messages import error_line

PATHS = {name: build(spec) for name, spec in choices.PATHS.items()}
GRIDS = {name: build(spec) for name, spec in choices.GRIDS.items()}
DDIM, HEUN, RK4 = solvers.ddim(), solvers.heun(), runge_kutta.rk4()


def bound(data, path):
    predict = data.predict(path)
    return lambda x, t: predict(x, jnp.full(len(x), t), None)


def noise(path, n, seed):
    drawn = np.random.default_rng(seed).standard_normal((n, 2))
    return jnp.asarray(float(path.sigma(np.float32(path.t_noise))) * drawn, jnp.float32)


@cache
def program(solver, path, teacher):
    """The costs of jumps, compiled once for as many candidates and samples."""

    @once(4)
    def costs(data, times, keys, x, probes):
        walk = grid_search.JumpCosts(teacher, probes)
        return walk(bound(data, path), solver, path, times, keys, x)

    return costs


def jumps(data, path, num_candidates, num_samples, solver, teacher=HEUN):
    times = grid_search.candidate_times(path, num_candidates)
    keys = jax.random.split(jax.random.key(1), num_samples)
    return program(solver, path, teacher)(data, times, keys, noise(path, num_samples, 0), probes=4)


def test_candidates_fall_from_noise_to_data():
    for name in ("linear", "cosine", "edm"):
        path = PATHS[name]
        times = np.asarray(grid_search.candidate_times(path, 64), np.float64)
        assert times.shape == (65,), name
        assert times[0] == pytest.approx(float(path.t_noise), rel=1e-7), name
        assert times[-1] == 0.0, name
        assert times[-2] >= float(path.t_min) * (1 - 1e-6), name
        assert (np.diff(times) < 0).all(), name


@pytest.mark.parametrize(("m", "n"), [(1, 1), (4, 2), (6, 3), (7, 7), (8, 4)])
def test_the_cheapest_is_the_best_of_all(m, n):
    costs = np.random.default_rng(10 * m + n).uniform(size=(m, m + 1))
    costs[np.tril_indices(m, k=0, m=m + 1)] = np.inf
    every = ([0, *inner] for inner in itertools.combinations(range(1, m), n - 1))
    best = min(sum(costs[i, j] for i, j in itertools.pairwise([*grid, m])) for grid in every)
    chosen = grid_search.cheapest(costs, n)
    assert grid_search.summed(costs, chosen) == pytest.approx(best)
    assert len(chosen) == n


def test_more_steps_than_candidates_are_refused():
    costs = np.where(np.arange(4) > np.arange(3)[:, None], 1.0, np.inf)
    with pytest.raises(UserError, match="at least 4 candidates"):
        grid_search.cheapest(costs, 4)


def test_costs_are_the_errors_that_arrive():
    """The flow of a Gaussian is affine and known: where a step's end and its start arrive."""
    mean, covariance = jnp.array([0.4, -0.2]), jnp.array([[0.5, 0.3], [0.3, 0.4]])
    data, n, m = analytic.Gaussian(mean, covariance), 2_500, 16
    path = Cosine()

    @jax.jit
    def arriving(x, t, t_next):
        """Errors at the end after a step, and of the prediction where the step begins."""
        denoise = bound(data, path)
        here, end = (data.flow(path, x, path.t_noise, time) for time in (t, 0.0))
        stepped, _ = DDIM.step(denoise, Interval(path, t, t_next, jnp.zeros(n)), (), here)
        ends = data.flow(path, stepped, t_next, 0.0), denoise(here, t).x0
        return [jnp.mean(jnp.sqrt(jnp.mean((one - end) ** 2, axis=1))) for one in ends]

    found, x = jumps(data, path, m, n, DDIM, RK4), noise(path, n, 0)
    assert np.isinf(np.asarray(found.costs)[np.tril_indices(m, k=0, m=m + 1)]).all()
    for i, j in ((0, 3), (0, 12), (5, 9), (10, 14)):
        expected, _ = arriving(x, found.times[i], found.times[j])
        # 10,000 probes: a standard error of 1 %.
        assert float(found.costs[i, j]) == pytest.approx(float(expected), rel=0.04)
    _, expected = arriving(x, found.times[9], found.times[10])
    assert float(found.costs[9, m]) == pytest.approx(float(expected), rel=1e-3)
    # Few candidates: it is clear at which of them a sample ends, before the noise is gone.
    found = jumps(data, path, 4, n, DDIM, RK4)
    expected, _ = arriving(x, found.times[1], found.times[3])
    assert float(found.costs[1, 3]) == pytest.approx(float(expected), rel=0.04)


def near(times, wanted):
    """Indices of the nearest candidates, moved apart where two of them are the same."""
    inner = np.asarray(times)[:-1]
    chosen = [int(np.argmin(np.abs(inner - t))) for t in np.asarray(wanted)[:-1]]
    for k in range(1, len(chosen)):
        chosen[k] = max(chosen[k], chosen[k - 1] + 1)
    return chosen


CURVED = LinearBeta()


@cache
def of_four():
    """The costs of DDIM's jumps on data of four Gaussians."""
    return jumps(mixture_of_four(), CURVED, 48, 128, DDIM)


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("name", ["ddim", "edm_heun"])
def test_no_named_grid_costs_less(name):
    path, solver = CURVED, build(choices.SOLVERS[name])
    found = of_four() if name == "ddim" else jumps(mixture_of_four(), path, 32, 32, solver)
    costs = np.asarray(found.costs)
    least = grid_search.summed(costs, grid_search.cheapest(costs, 5))
    named = jax.jit(lambda: {name: grid(path, 5) for name, grid in GRIDS.items()})()
    for name, times in named.items():
        other = grid_search.summed(costs, near(found.times, times))
        assert least <= other * (1 + 1e-9), name


@pytest.mark.thorough
def test_found_grids_end_nearer_to_the_exact_flow_than_uniform_ones():
    """On noise that the search did not see."""
    data, n, path = mixture_of_four(), 128, CURVED
    keys = jax.random.split(jax.random.key(3), n)

    @jax.jit
    def errors(times, x, exact):
        ends = sample_padded(bound(data, path), DDIM, path, times, keys, x)
        return jnp.mean(jnp.linalg.norm(ends - exact, axis=1))

    flow = jax.jit(lambda x: data.flow(path, x, path.t_noise, 0.0))
    candidates = np.asarray(of_four().times)
    seen, *fresh = [(x, flow(x)) for x in (noise(path, n, seed) for seed in (0, 5, 6, 7, 8))]

    def error(times, pairs):
        times = np.pad(times, (0, 11 - len(times)))
        return float(np.mean([errors(times, *pair) for pair in pairs]))

    for steps in (5, 10):
        chosen = grid_search.refined(
            lambda grid: error(candidates[[*grid, 48]], [seen]),
            grid_search.cheapest(np.asarray(of_four().costs), steps),
            48,
        )
        uniform = error(np.asarray(GRIDS["uniform"](path, steps)), fresh)
        assert error(candidates[[*chosen, 48]], fresh) < 0.97 * uniform, steps


def test_refining_ends_in_a_minimum_within_bounds():
    def error(grid):
        assert all(i < j for i, j in itertools.pairwise([*grid, 20]))
        return (grid[1] - 12) ** 2 + (grid[2] - 30) ** 2

    assert grid_search.refined(error, [0, 3, 5], 20) == [0, 12, 19]
    assert grid_search.refined(lambda grid: 1.0, [0, 3, 5], 20) == [0, 3, 5]


GOOD = {"path": "Linear", "times": [1.0, 0.5, 0.2, 0.0], "num_steps": 3}


def saved(workdir, **changes):
    file = grid_file(workdir, "ddim", 3)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(GOOD | changes))


def test_a_saved_grid_is_read_and_begins_where_the_path_says(tmp_path):
    path = Linear(t_noise=1.0 + 1e-7)
    saved(tmp_path)
    grid = read_grid(str(tmp_path), "ddim", 3, path)
    assert grid.times == (path.t_noise, 0.5, 0.2)
    np.testing.assert_array_equal(grid(path, 3), np.array([path.t_noise, 0.5, 0.2, 0.0], "f"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": [1.0, 0.2, 0.5, 0.0]}, "don't fall"),
        ({"times": [1.0, 0.5, 0.2, 0.1]}, "ends in 0.1, not in 0"),
        ({"times": [0.9, 0.5, 0.2, 0.0]}, "not from t_noise=1 down"),
        ({"times": [1.0, 0.5, 1e-4, 0.0]}, "down to t_min=0.001"),
        ({"times": [1.0, 0.5, 0.0]}, "3 steps need 4"),
        ({"times": [1.0, "a", 0.5, 0.0]}, "no list of numbers"),
        ({"times": None}, "no list of numbers"),
        ({"path": "EDM"}, "found on path EDM, and this run's is Linear"),
    ],
)
def test_a_file_that_was_changed_is_refused_in_one_line(tmp_path, changes, message):
    saved(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        read_grid(str(tmp_path), "ddim", 3, Linear())
    error = str(caught.value)
    assert message in error
    assert f"python -m experiments.find_grid --workdir={tmp_path}" in error
    assert "\n" not in error


def test_a_grid_that_was_not_found_says_how_to_find_it(tmp_path):
    with pytest.raises(UserError, match=r"no grid has been found yet; .*--solver=heun") as caught:
        read_grid(str(tmp_path), "heun", 2, Linear())
    assert str(caught.value).endswith("--num_steps=2")


def run(script, *arguments):
    return cli.run(script.main, script.FLAGS, usage=script.USAGE, argv=arguments)


@pytest.mark.thorough
def test_the_command_saves_what_the_others_use_and_mistakes_end_in_one_line(tmp_path, capsys):
    config = digits.get_config()
    config.num_steps = 2
    config.model.update(hidden_size=16, depth=1, num_heads=2)
    config.sampling.num_steps = 2
    config.evaluation.update(num_samples=20, batch_size=24, solvers=("ddim",), num_steps=(2,))
    folder = tmp_path / "digits"
    diffjax.train(config.lock(), folder)
    workdir = f"--workdir={folder}"
    small = ("--num_samples=8", "--num_candidates=8", "--teacher=heun", "--batch_size=5")
    assert run(find_grid, workdir, "--solver=ddim", "--num_steps=2,3", *small) == 0

    file = folder / "grids" / "ddim_3.json"
    content = json.loads(file.read_text())
    assert len(content["times"]) == content["num_steps"] + 1 == 4
    assert (content["solver"], content["path"], content["step"]) == ("ddim", "Linear", 2)
    assert {"found", *choices.GRIDS} <= set(content["end_errors"])
    assert content["predicted_error"] > 0.0
    out = tmp_path / "grid.png"
    common = [workdir, "--solver=ddim", "--grid=found", "--num_steps=3"]
    assert run(sample_script, *common, "--num_samples=2", f"--out={out}") == 0
    with np.load(out.with_suffix(".npz")) as images:
        assert images["grid"] == "found"
    rows = ["--grids=uniform,found", "--num_steps=2,3", "--solvers=ddim", "--num_samples=20"]
    assert run(evaluate, workdir, *rows) == 0
    grids = [row["grid"] for row in json.loads((folder / "evaluation.json").read_text())["by_nfe"]]
    assert grids.count("found") == 2

    file.write_text(json.dumps(content | {"times": None}))
    for script, arguments, message in (
        (sample_script, "--solver=ddim --grid=found --num_steps=3", "no list of numbers"),
        (sample_script, "--grid=found --solver=heun", "--solver=heun --num_steps=2"),
        (sample_script, "--grid=foun", "did you mean 'found'"),
        (evaluate, "--grids=found --solvers=heun", "no grid has been found yet"),
        (find_grid, "--solver=ddpm", "fresh noise"),
        (find_grid, "--teacher=unipc", "looks back"),
        (find_grid, "--teacher=rk5", "did you mean 'rk4'"),
        (find_grid, "--num_steps=0", "integers from 1"),
        (find_grid, "--num_steps=9 --num_candidates=4", "9 steps need at least as many candidates"),
    ):
        capsys.readouterr()
        assert run(script, workdir, *arguments.split()) == 2
        error = capsys.readouterr().err
        assert message in error_line(error)


def test_help_is_short(capsys):
    assert run(find_grid, "--help") == 0
    assert len(capsys.readouterr().out.splitlines()) < 40 + len(choices.SOLVERS)
