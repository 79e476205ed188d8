"""`experiments.encode_latents` in processes of its own: killed, and two of them together."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from diffjax.autoencoders.encoding import Stored, encode
from diffjax.codecs import SpaceToDepth
from diffjax.data import digits
from tests.support.trainer import Trainer

HOW = Stored(flips=True, shard_images=20)
COMMAND = (
    "--config=configs/digits.py --codec=space_to_depth:block=2 --flips --shard_images=20 "
    "--batch_size=5"
)

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    encode(digits(), SpaceToDepth(2), folder, HOW)
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    names = sorted(file.name for file in whole.glob("*.npy"))
    assert sorted(file.name for file in folder.glob("*.npy")) == names
    for name in names:
        np.testing.assert_array_equal(np.load(folder / name), np.load(whole / name), name)
    assert (folder / "latents.json").read_text() == (whole / "latents.json").read_text()


def test_a_killed_process_goes_on_at_its_shard(trainer, tmp_path, whole):
    """Killed twice, after 5 more of 90 shards each, as seen from outside."""
    records = tmp_path / "unfinished/shards"
    arguments = [*COMMAND.split(), f"--out={tmp_path}"]

    def encode_until(number: int) -> None:
        def kill(pids: list[int]) -> None:
            until = time.monotonic() + 120
            while time.monotonic() < until and len(list(records.glob("*.json"))) < number:
                time.sleep(0.002)
            os.kill(pids[0], signal.SIGKILL)

        ((status, said),) = trainer.start("encode_latents", [arguments], kill)
        assert status == -signal.SIGKILL, said

    encode_until(5)
    encode_until(10)
    there = len(list(records.glob("*.json")))
    ((status, said),) = trainer.start("encode_latents", [arguments])
    assert status == 0, said
    assert f"going on: {there} of 90 shards are there" in said
    assert_same(tmp_path, whole)


def test_two_processes_encode_as_one_does(trainer, tmp_path, whole):
    ended = trainer.together(2, [*COMMAND.split(), f"--out={tmp_path}"], program="encode_latents")
    assert [status for status, _ in ended] == [0, 0], ended
    assert_same(tmp_path, whole)
