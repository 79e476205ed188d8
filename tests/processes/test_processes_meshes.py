"""Two and four processes are one device: DiT and U-Net, each axis across them, parts of a batch."""

import jax
import numpy as np
import pytest

from diffjax.data import digits
from diffjax.training.setup import set_up
from diffjax.training.sharding import make_mesh
from experiments import config_files
from tests.processes.test_processes import ATOL, RTOL, state_of
from tests.support.trainer import CONFIG, STEPS, Trainer

TWO_STEPS = CONFIG.replace(f'"tiny", {STEPS}, 16', '"tiny", 2, 16').replace(
    "config.checkpoint_every_steps, config.checkpoints_to_keep = 2, 9",
    "config.checkpoint_every_steps, config.checkpoints_to_keep = 2, 1",
)
NETWORKS = {
    "dit": "from diffjax.models import DiT\n    config.model = spec(DiT, patch_size=4, "
    "hidden_size=32, depth=1, num_heads=4)\n",
    "unet": "from diffjax.models import UNet\n    config.model = spec(UNet, channels=16, "
    "channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(), head_channels=16, "
    "dropout=0.0)\n",  # The middle attends; programs that compile in seconds.
}
# What goes across processes: each axis, either number of processes, parts on and off. Which network
# it is matters little here: test_accumulation.py and test_meshes.py have both on all axes.
CASES = [
    ("dit", 2, "data", 1), ("dit", 2, "tensor", 2), ("dit", 4, "fsdp", 2),
    ("dit", 2, "sequence", 1), ("unet", 4, "tensor", 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def one(request, tmp_path_factory):
    """A trainer, what its runs are set up like, and the state of one process with one device."""
    text = TWO_STEPS.replace("config.model = spec(Tiny)\n", NETWORKS[request.param])
    trainer = Trainer(tmp_path_factory.mktemp("outputs"), text)
    config = config_files.load(str(trainer.config)).lock()
    data = digits()
    setup = set_up(config, data.image_shape, data.num_classes, make_mesh(devices=jax.devices()[:1]))
    workdir = tmp_path_factory.mktemp("alone") / "run"
    status, said = trainer.run(workdir)
    assert status == 0, said
    yield trainer, setup, state_of(workdir, setup, 2)
    trainer.close()


@pytest.mark.process
@pytest.mark.parametrize(("one", "processes", "axis", "parts"), CASES, indirect=["one"])
def test_processes_on_a_mesh_are_one_device(one, processes, axis, parts, tmp_path):
    trainer, setup, expected = one
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1, axis: processes}
    flags = [f"--config.mesh.{name}={size}" for name, size in sizes.items()]
    flags.append(f"--config.accumulation_steps={parts}")
    ended = trainer.together(processes, [*trainer.arguments(tmp_path / "run"), *flags])
    assert [status for status, _ in ended] == [0] * processes, ended
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=RTOL, atol=ATOL),
        state_of(tmp_path / "run", setup, 2),
        expected,
    )
