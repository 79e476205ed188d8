"""`experiments.encode_latents` in processes of its own: killed, and two of them together."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from diffjax.autoencoders.encoding import Stored, encode
from diffjax.codecs import SpaceToDepth
from diffjax.data import digits
from tests.support.trainer import ENVIRONMENT, ROOT

HOW = Stored(flips=True, shard_images=20)
COMMAND = (
    "--config=configs/digits.py --codec=space_to_depth:block=2 --flips --shard_images=20 "
    "--batch_size=5"
)

pytestmark = pytest.mark.process


def started(folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.encode_latents", *COMMAND.split()]
    return subprocess.Popen(
        [*command, f"--out={folder}", *flags],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


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


def test_a_killed_process_goes_on_at_its_shard(tmp_path, whole):
    """Killed twice, after 5 more of 90 shards each, as seen from outside."""
    records = tmp_path / "unfinished/shards"
    for kill in (1, 2):
        process = started(tmp_path)
        while process.poll() is None and len(list(records.glob("*.json"))) < 5 * kill:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    there = len(list(records.glob("*.json")))
    process = started(tmp_path)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"going on: {there} of 90 shards are there" in said
    assert_same(tmp_path, whole)


def test_two_processes_encode_as_one_does(tmp_path, whole):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    each = [
        started(
            tmp_path, f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_index={i}"
        )
        for i in range(2)
    ]
    for process in each:
        said, _ = process.communicate(timeout=180)
        assert process.returncode == 0, said
    assert_same(tmp_path, whole)
