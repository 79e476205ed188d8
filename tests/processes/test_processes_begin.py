"""Two processes, whose parameters are split over both, begin with weights, freeze, and go on."""

import json

import jax
import numpy as np
import pytest

from diffjax import config_files
from diffjax.data import digits
from diffjax.runs.setup import set_up
from diffjax.training.sharding import make_mesh
from diffjax.training.state import LIVE
from tests.processes.test_processes import ATOL, RTOL, state_of
from tests.processes.test_processes_meshes import TWO_STEPS
from tests.support.trainer import Trainer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("outputs"), TWO_STEPS, pictures=False)


@pytest.mark.process
def test_two_processes_begin_freeze_and_extend_as_one_does(trainer, tmp_path):
    source = tmp_path / "source"
    status, said = trainer.run(source)
    assert status == 0, said

    def train(name, number, *flags):
        axes = ["--config.mesh.data=1", f"--config.mesh.fsdp={number}"]
        arguments = [f"--config={trainer.config}", f"--workdir={tmp_path / name}", *axes]
        begin = [f"--config.init_from={source}:live", "--config.trainable=final_conv/*"]
        ended = trainer.together(number, [*arguments, *begin, *flags])
        assert [status for status, _ in ended] == [0] * number, ended

    for name, number in (("alone", 1), ("pair", 2)):
        train(name, number)
        train(name, number, "--config.num_steps=4", "--extend=restart")

    config = config_files.load(str(trainer.config))
    config.trainable = "final_conv/*"
    data, mesh = digits(), make_mesh(devices=jax.devices()[:1])
    setup = set_up(config.lock(), data.image_shape, data.condition, mesh=mesh)
    alone, pair = (state_of(tmp_path / name, setup, 4) for name in ("alone", "pair"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=RTOL, atol=ATOL), alone, pair)
    jax.tree.map(np.testing.assert_array_equal, alone.frozen, pair.frozen)
    noted = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("alone", "pair")]
    assert noted[0]["init_from"] == noted[1]["init_from"]
    (entry,) = noted[1]["changes"]
    assert (entry["step"], entry["schedule"], entry["schedule_start"]) == (2, "restart", 2)
    assert set(pair.weights(LIVE)) == {"conv_in", "embed", "final_conv"}
