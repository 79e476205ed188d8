"""What the arms of a sweep have alike: weights, data, noise, and counted operations of training."""

import json
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.conditions import of_classes
from diffjax.data import digits
from diffjax.errors import UserError
from diffjax.loop.device_batches import device_batches
from diffjax.objectives.base import Progress, conditioned_batch
from diffjax.process.paths import coeffs, time_of_log_snr
from diffjax.runs.setup import set_up
from diffjax.spec import spec
from diffjax.sweeps import cells
from diffjax.sweeps.cells import plan_cells, resolved
from diffjax.sweeps.sweep import Cost, Sweep
from diffjax.training.sharding import make_mesh
from experiments import sweep
from experiments.flags import cli
from tests.support import tiny_config_file
from tests.support.one_process import Here, sweeps_here
from tests.support.tiny_network import Plain

TINY = {
    "config.model.hidden_size": 16, "config.model.depth": 1, "config.model.num_heads": 2,
    "config.batch_size": 8, "config.num_steps": 60,
}  # fmt: skip
# Two paths, two targets; one cell of another seed.
CELLS = ("flow-seed=0", "v-seed=0", "flow-seed=1")


@pytest.fixture(scope="module")
def setups():
    """On one device, for speed."""
    axes = {"objective": ("flow", "v"), "config.seed": (0, 1)}
    small = {"config.batch_size": 8}
    cells = {cell.name: cell for cell in Sweep("configs/digits.py", axes, small).cells()}
    mesh = make_mesh(devices=jax.devices()[:1])
    configs = {name: resolved(cells[name]).copy_and_resolve_references() for name in CELLS}
    for config in configs.values():
        config.unlock()
        config.model = spec(Plain)
    return {
        name: set_up(config, (8, 8, 1), of_classes(10), mesh) for name, config in configs.items()
    }


def equal(one, other):
    return all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


@pytest.mark.thorough
def test_arms_of_one_seed_start_from_the_same_weights(setups):
    flow, v, other = (
        setup.init(jax.random.key(setup.config.seed)).params for setup in setups.values()
    )
    assert equal(flow, v)
    assert not equal(flow, other)


def test_arms_of_one_seed_see_the_same_images_in_the_same_order(setups):
    flow, v, other = (
        list(islice(device_batches(setup, digits(), 0), 3)) for setup in setups.values()
    )
    assert equal(flow, v)
    assert not equal(flow, other)
    assert not equal(flow[0], flow[1])


def noise_of(setup, batch, key):
    """The noise that the objective adds to images, from the inputs of a network that returns 0."""
    objective, batch = setup.wired.objective, conditioned_batch(batch, setup.wired.condition)

    @jax.jit
    def found(key, batch):
        asked = []

        def apply(params, x, noise_label, cond, *, key=None):
            del params, noise_label, cond, key
            asked.append(x)
            return 0.0 * x

        _, metrics = objective(apply, {}, {}, key, batch, Progress(jnp.zeros((), jnp.int32), {}))
        c = coeffs(objective.path, time_of_log_snr(objective.path, metrics["log_snr"]), 4)
        return (asked[0] - c.a * batch["image"]) / c.s

    return np.asarray(found(key, batch))


@pytest.mark.thorough(tenth=False)
def test_arms_of_one_seed_are_trained_with_the_same_noise(setups):
    batch = next(device_batches(setups["flow-seed=0"], digits(), 0))
    flow, v = (noise_of(setups[name], batch, jax.random.key(5)) for name in CELLS[:2])
    assert np.std(flow) == pytest.approx(1.0, abs=0.1)
    np.testing.assert_allclose(v, flow, atol=0.02)
    assert not np.allclose(noise_of(setups["v-seed=0"], batch, jax.random.key(6)), flow, atol=1)


@pytest.mark.thorough
def test_a_derivative_through_the_network_is_charged():
    """Mean flow takes a JVP beside the prediction, and is trained as much fewer steps."""
    found = Sweep("configs/digits.py", {"objective": ("flow", "mean_flow")}, TINY, matched="flops")
    cells, costs, reasons, _ = plan_cells(found)
    assert not reasons
    charged = {name: cost.flops_per_step or 0.0 for name, cost in costs.items()}
    ratio = charged["mean_flow"] / charged["flow"]
    assert 1.3 < ratio < 2.5
    assert int(cells[1].overrides["config.num_steps"]) == round(60 / ratio)


def seeds_together(tmp_path) -> tuple[str, ...]:
    """The arguments of a sweep of two seeds, which are an ensemble."""
    file = tmp_path / "two.py"
    shared = {
        "config.batch_size": 8, "config.num_steps": 2, "config.sampling.num_steps": 2,
        "config.evaluation.num_samples": 20,
        "config.evaluation.solvers": (), "config.evaluation.num_steps": (),
    }  # fmt: skip
    config = str(tiny_config_file.write(tmp_path))
    file.write_text(
        "from diffjax.sweeps.sweep import Sweep\n\ndef get_sweep():\n"
        f"    return Sweep({config!r}, {{'config.seed': (0, 1)}}, {shared!r})\n"
    )
    return f"--sweep={file}", f"--workdir={tmp_path / 'two'}", "--ensemble=2"


def test_the_seeds_of_an_ensemble_are_trained_by_one_call(tmp_path, monkeypatch, capsys):
    calls = []

    def train_together(configs, folders, commands):
        calls.append(list(zip((x.seed for x in configs), (x.name for x in folders), strict=True)))
        raise UserError("not trained")

    sweeps_here(monkeypatch)
    monkeypatch.setattr(cells, "train_together", train_together)
    monkeypatch.setattr(cells, "training_cost", lambda *_, **__: Cost(2, 8, None))
    argv = seeds_together(tmp_path)
    assert cli.run(sweep.main, sweep.FLAGS, usage=sweep.USAGE, argv=argv) == 2
    assert calls == [[(0, "seed=0"), (1, "seed=1")]]
    failed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert failed == [f"failed: seed={i}: not trained; see its output.txt" for i in (0, 1)]


@pytest.mark.process
@pytest.mark.thorough(tenth=False)
def test_an_ensemble_of_two_seeds_is_trained_as_one_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Here)
    folder, argv = tmp_path / "two", seeds_together(tmp_path)
    assert cli.run(sweep.main, sweep.FLAGS, usage=sweep.USAGE, argv=argv) == 0, capsys.readouterr()
    runs = [json.loads((folder / f"seed={seed}" / "run.json").read_text()) for seed in (0, 1)]
    assert [run["ensemble"]["members"] for run in runs] == [2, 2]
    content = json.loads((folder / "report.json").read_text())
    (row,) = content["verdict_rows"]
    assert (row["seeds"], row["verdict"]) == (2, "nothing to compare it with")
    assert content["quality"][0]["runs"] == 2
