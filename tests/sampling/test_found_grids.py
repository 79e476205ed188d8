"""Found grids: the best of all by brute force, costs in closed form, and the command."""

import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from configs import digits
from diffjax import choices
from diffjax.errors import UserError
from diffjax.evaluation.convergence import mixture_of_four
from diffjax.process import analytic
from diffjax.process.paths import Cosine, Linear, LinearBeta
from diffjax.sampling import found_grids, runge_kutta, solvers
from diffjax.sampling.sample import sample
from diffjax.spec import build
from experiments import cli, evaluate, find_grid
from experiments import sample as sample_script

PATHS = {name: build(spec) for name, spec in choices.PATHS.items()}
GRIDS = {name: build(spec) for name, spec in choices.GRIDS.items()}


def bound(data, path):
    predict = data.predict(path)
    return lambda x, t: predict(x, jnp.full(len(x), t), None)


def noise(path, n, seed):
    return path.sigma(jnp.asarray(path.t_noise)) * jax.random.normal(jax.random.key(seed), (n, 2))


def jumps(data, path, num_candidates, num_samples, solver, probes=4):
    walk = partial(
        found_grids.measure_jumps, bound(data, path), solver, path, teacher=runge_kutta.rk4()
    )
    times = found_grids.candidates(path, num_candidates)
    keys = jax.random.split(jax.random.key(1), num_samples)
    return jax.jit(partial(walk, probes=probes))(times, keys, noise(path, num_samples, 0))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_candidates_fall_from_noise_to_data(path):
    times = np.asarray(found_grids.candidates(path, 64), np.float64)
    assert times.shape == (65,)
    assert times[0] == pytest.approx(float(path.t_noise), rel=1e-7)
    assert times[-1] == 0.0
    assert times[-2] >= float(path.t_min) * (1 - 1e-6)
    assert (np.diff(times) < 0).all()


@pytest.mark.parametrize(("m", "n"), [(1, 1), (4, 2), (6, 3), (7, 7), (8, 4)])
def test_the_cheapest_is_the_best_of_all(m, n):
    costs = np.random.default_rng(10 * m + n).uniform(size=(m, m + 1))
    costs[np.tril_indices(m, k=0, m=m + 1)] = np.inf
    every = ([0, *inner] for inner in itertools.combinations(range(1, m), n - 1))
    best = min(sum(costs[i, j] for i, j in itertools.pairwise([*grid, m])) for grid in every)
    chosen = found_grids.cheapest(costs, n)
    assert found_grids.summed(costs, chosen) == pytest.approx(best)
    assert len(chosen) == n


def test_more_steps_than_candidates_are_refused():
    costs = np.where(np.arange(4) > np.arange(3)[:, None], 1.0, np.inf)
    with pytest.raises(UserError, match="at least 4 candidates"):
        found_grids.cheapest(costs, 4)


@pytest.mark.parametrize("path", [Linear(), Cosine()])
def test_costs_are_the_errors_that_arrive(path):
    """The flow of a Gaussian is affine and known: where a step's end and its start arrive."""
    mean, covariance = jnp.array([0.4, -0.2]), jnp.array([[0.5, 0.3], [0.3, 0.4]])
    data, n, m = analytic.Gaussian(mean, covariance), 4_000, 24
    found = jumps(data, path, m, n, solvers.ddim())
    assert np.isinf(np.asarray(found.costs)[np.tril_indices(m, k=0, m=m + 1)]).all()
    x = noise(path, n, 0)
    end = data.flow(path, x, path.t_noise, 0.0)
    keys = jax.random.split(jax.random.key(1), n)
    for i, j in ((0, 3), (0, 12), (5, 9), (10, 20)):
        t, t_next = found.times[i], found.times[j]
        here = data.flow(path, x, path.t_noise, t)
        stepped, _ = solvers.ddim().step(bound(data, path), path, (), here, t, t_next, keys)
        arrived = data.flow(path, stepped, t_next, 0.0)
        expected = np.mean(np.sqrt(np.mean((arrived - end) ** 2, axis=1)))
        # 16,000 probes: a standard error of 0.8 %.
        assert float(found.costs[i, j]) == pytest.approx(float(expected), rel=0.04)
    last = bound(data, path)(data.flow(path, x, path.t_noise, found.times[9]), found.times[9]).x0
    expected = np.mean(np.sqrt(np.mean((last - end) ** 2, axis=1)))
    assert float(found.costs[9, m]) == pytest.approx(float(expected), rel=1e-3)


def near(times, wanted):
    """Indices of the nearest candidates, moved apart where two of them are the same."""
    inner = np.asarray(times)[:-1]
    chosen = [int(np.argmin(np.abs(inner - t))) for t in np.asarray(wanted)[:-1]]
    for k in range(1, len(chosen)):
        chosen[k] = max(chosen[k], chosen[k - 1] + 1)
    return chosen


@pytest.mark.parametrize("name", ["ddim", "edm_heun"])
def test_no_named_grid_costs_less(name):
    path = LinearBeta()
    found = jumps(mixture_of_four(), path, 32, 32, build(choices.SOLVERS[name]))
    for n in (3, 6):
        least = found_grids.summed(found.costs, found_grids.cheapest(found.costs, n))
        for grid in GRIDS.values():
            other = found_grids.summed(found.costs, near(found.times, grid(path, n)))
            assert least <= other * (1 + 1e-9)


@pytest.mark.parametrize("path", [Linear(), LinearBeta()])
def test_found_grids_end_nearer_to_the_exact_flow_than_uniform_ones(path):
    """On noise that the search did not see."""
    data, solver, n = mixture_of_four(), solvers.ddim(), 128
    found = jumps(data, path, 48, n, solver)
    keys = jax.random.split(jax.random.key(3), 512)

    @jax.jit
    def errors(times, x, exact):
        ends = sample(bound(data, path), solver, path, times, keys[: len(x)], x)
        return jnp.mean(jnp.linalg.norm(ends - exact, axis=1))

    seen, fresh = noise(path, n, 0), noise(path, 512, 5)
    seen_end, fresh_end = (data.flow(path, x, path.t_noise, 0.0) for x in (seen, fresh))

    def times(chosen):
        return found.times[jnp.asarray([*chosen, 48])]

    for steps in (5, 7, 10):
        chosen = found_grids.refined(
            lambda grid: float(errors(times(grid), seen, seen_end)),
            found_grids.cheapest(found.costs, steps),
            48,
        )
        uniform = float(errors(GRIDS["uniform"](path, steps), fresh, fresh_end))
        assert float(errors(times(chosen), fresh, fresh_end)) < 0.97 * uniform


def test_refining_ends_in_a_minimum_within_bounds():
    def error(grid):
        assert all(i < j for i, j in itertools.pairwise([*grid, 20]))
        return (grid[1] - 12) ** 2 + (grid[2] - 30) ** 2

    assert found_grids.refined(error, [0, 3, 5], 20) == [0, 12, 19]
    assert found_grids.refined(lambda grid: 1.0, [0, 3, 5], 20) == [0, 3, 5]


def run(script, *arguments):
    return cli.run(script.main, script.FLAGS, usage=script.USAGE, argv=arguments)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    config = digits.get_config()
    config.num_steps = 2
    config.model.update(hidden_size=16, depth=1, num_heads=2)
    config.sampling.num_steps = 2
    config.evaluation.update(num_samples=20, batch_size=24, solvers=("ddim",), num_steps=(2,))
    folder = tmp_path_factory.mktemp("found_grids") / "digits"
    diffjax.train(config.lock(), folder)
    return folder


@pytest.fixture(scope="module")
def found(workdir):
    small = ("--num_samples=8", "--num_candidates=8", "--teacher=heun", "--batch_size=5")
    assert run(find_grid, f"--workdir={workdir}", "--solver=ddim", "--num_steps=2,3", *small) == 0
    return workdir / "grids" / "ddim_3.json"


def test_the_command_saves_what_the_others_use(workdir, found, tmp_path, capsys):
    content = json.loads(found.read_text())
    assert len(content["times"]) == content["num_steps"] + 1 == 4
    assert (content["solver"], content["path"], content["step"]) == ("ddim", "Linear", 2)
    assert {"found", *choices.GRIDS} <= set(content["end_errors"])
    assert content["predicted_error"] > 0.0
    out = tmp_path / "grid.png"
    common = [f"--workdir={workdir}", "--solver=ddim", "--grid=found"]
    assert run(sample_script, *common, "--num_steps=3", "--num_samples=2", f"--out={out}") == 0
    with np.load(out.with_suffix(".npz")) as saved:
        assert saved["grid"] == "found"
    rows = ["--grids=uniform,found", "--num_steps=2,3", "--solvers=ddim", "--num_samples=20"]
    assert run(evaluate, f"--workdir={workdir}", *rows) == 0
    grids = [row["grid"] for row in json.loads((workdir / "evaluation.json").read_text())["by_nfe"]]
    assert grids.count("found") == 2


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
def test_a_file_that_was_changed_is_refused_in_one_line(found, changes, message, capsys):
    before = found.read_text()
    found.write_text(json.dumps(json.loads(before) | changes))
    workdir = f"--workdir={found.parents[1]}"
    try:
        assert run(sample_script, workdir, "--solver=ddim", "--grid=found", "--num_steps=3") == 2
    finally:
        found.write_text(before)
    error = capsys.readouterr().err
    assert message in error
    assert "python -m experiments.find_grid" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (sample_script, "--grid=found --solver=heun", "--solver=heun --num_steps=2"),
        (sample_script, "--grid=foun", "did you mean 'found'"),
        (evaluate, "--grids=found --solvers=heun", "no grid has been found yet"),
        (find_grid, "--solver=ddpm", "fresh noise"),
        (find_grid, "--teacher=unipc", "looks back"),
        (find_grid, "--teacher=rk5", "did you mean 'rk4'"),
        (find_grid, "--num_steps=0", "whole numbers from 1"),
        (find_grid, "--num_steps=9 --num_candidates=4", "9 steps need at least as many candidates"),
    ],
)
def test_mistakes_end_in_one_line(workdir, script, arguments, message, capsys):
    assert run(script, f"--workdir={workdir}", *arguments.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_help_is_short(capsys):
    assert run(find_grid, "--help") == 0
    assert len(capsys.readouterr().out.splitlines()) < 40 + len(choices.SOLVERS)
