"""Two processes are one device, whichever axis goes across them, and with parts of a batch."""

import jax
import numpy as np
import pytest

from diffjax import config_files
from diffjax.data import digits
from diffjax.runs.setup import set_up
from diffjax.training.sharding import make_mesh
from tests.processes.test_processes import ATOL, RTOL, state_of
from tests.support.trainer import CONFIG, STEPS, Trainer
from tests.support.witnesses import witnesses

TWO_STEPS = CONFIG.replace(f'"tiny", {STEPS}, 16', '"tiny", 2, 16').replace(
    "config.checkpoint_every_steps, config.checkpoints_to_keep = 2, 9",
    "config.checkpoint_every_steps, config.checkpoints_to_keep = 2, 1",
)
DIT = (
    "from diffjax.models import DiT\n    config.model = spec(DiT, patch_size=4, hidden_size=32, "
    "depth=1, num_heads=2)\n"
)
# `data` goes across processes in test_processes.py. Which network it is matters little here:
# test_accumulation.py and test_meshes.py have both on all axes.
CASES = {"tensor": 2, "fsdp": 2, "sequence": 1}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A trainer, what its runs are set up like, and the state of one process with one device."""
    text = TWO_STEPS.replace("config.model = spec(Tiny)\n", DIT)
    trainer = Trainer(tmp_path_factory.mktemp("outputs"), text, pictures=False)
    config = config_files.load(str(trainer.config)).lock()
    data = digits()
    setup = set_up(config, data.image_shape, data.condition, make_mesh(devices=jax.devices()[:1]))
    workdir = tmp_path_factory.mktemp("alone") / "run"
    status, said = trainer.run(workdir)
    assert status == 0, said
    return trainer, setup, state_of(workdir, setup, 2)


@pytest.mark.process
@pytest.mark.parametrize(("axis", "parts"), witnesses(CASES.items(), [("fsdp", 2)]))
def test_processes_on_a_mesh_are_one_device(one, axis, parts, tmp_path):
    trainer, setup, expected = one
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1, axis: 2}
    flags = [f"--config.mesh.{name}={size}" for name, size in sizes.items()]
    flags.append(f"--config.accumulation_steps={parts}")
    ended = trainer.together(2, [*trainer.arguments(tmp_path / "run"), *flags])
    assert [status for status, _ in ended] == [0, 0], ended
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=RTOL, atol=ATOL),
        state_of(tmp_path / "run", setup, 2),
        expected,
    )
