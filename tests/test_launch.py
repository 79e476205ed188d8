"""The launch scripts, with stand-ins for what a cluster has."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from experiments import train

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "experiments" / "launch"


def stand_in(folder: Path, name: str, code: str) -> None:
    path = folder / name
    path.write_text(f'#!/bin/bash\necho {name} "$@" >> {folder}/said\n{code}\n')
    path.chmod(0o755)


def launch(script: str, folder: Path, *arguments: str, **variables: str):
    path = f"{folder}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(FOLDER / script), *arguments], capture_output=True, text=True,
        env={"PATH": path, **variables}, cwd=folder,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("status", "state", "restarts", "queued"),
    [
        (0, "RUNNING", "0", False),
        (2, "RUNNING", "0", False),
        (1, "RUNNING", "0", False),
        (75, "RUNNING", "0", True),
        (130, "RUNNING", "3", True),
        (134, "RUNNING", "0", True),
        (137, "RUNNING", "0", True),
        (143, "RUNNING", "0", True),
        (143, "COMPLETING", "0", False),  # somebody cancelled it
        (75, "RUNNING", "100", False),
    ],
)
def test_slurm_queues_again_what_is_worth_another_try(tmp_path, status, state, restarts, queued):
    stand_in(tmp_path, "srun", f"exit {status}")
    stand_in(tmp_path, "squeue", f"echo {state}")
    stand_in(tmp_path, "scontrol", "")
    variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts}
    done = launch("slurm.sh", tmp_path, "--config=a b.py", "--workdir=w", **variables)
    said = (tmp_path / "said").read_text()
    assert "python -m experiments.train --distributed --config=a b.py --workdir=w" in said
    assert ("scontrol requeue 7" in said) == queued
    assert done.returncode == (0 if queued else status)


def test_xpk_keeps_flags_apart(tmp_path):
    stand_in(tmp_path, "xpk", f"printf '%s\\0' \"$@\" > {tmp_path}/arguments")
    flags = ["--config=configs/digits.py:model=unet", "--workdir=/runs/a b"]
    variables = {"CLUSTER": "c", "TPU": "v5litepod-16", "SLICES": "2"}
    assert launch("xpk.sh", tmp_path, "name", *flags, **variables).returncode == 0
    (command,) = re.findall("--command=([^\0]*)\0", (tmp_path / "arguments").read_text())
    stand_in(tmp_path, "pip", "")
    stand_in(tmp_path, "python", f"printf '%s\\0' \"$@\" > {tmp_path}/arguments")
    run = subprocess.run(["sh", "-c", command], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert run.returncode == 0
    arguments = (tmp_path / "arguments").read_text().split("\0")[:-1]
    assert arguments == ["-m", "experiments.train", "--distributed", *flags]


@pytest.mark.parametrize(("script", "status"), [("slurm.sh", 2), ("xpk.sh", 2)])
def test_without_arguments_they_say_how_to_be_called(tmp_path, script, status):
    done = launch(script, tmp_path)
    assert done.returncode == status
    assert script in done.stderr


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_flags_in_them_exist(path):
    own = "coordinator|num_processes|process_index|distributed|config|workdir"
    for command in re.findall(r"experiments\.train(.*)", path.read_text()):
        for flag in re.findall(rf"--({own}|[a-z]+_[a-z_]+)", command):
            assert flag in train.FLAGS
