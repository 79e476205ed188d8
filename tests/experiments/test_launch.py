"""The launch scripts, with stand-ins for what a cluster has."""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from experiments import train
from experiments.flags import shared

ROOT = Path(__file__).parents[2]
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


@pytest.mark.process
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


EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
ONE_A_NODE = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_TASKS_PER_NODE": "1(x2)"}


@pytest.mark.parametrize(
    "flags",
    [
        {"distributed": True},
        {"distributed": False, "coordinator": "h:1", "num_processes": 2, "process_index": 0},
    ],
)
@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        (ONE_A_NODE | EIGHT, range(8)),
        (ONE_A_NODE | {"SLURM_GPUS_ON_NODE": "4"}, range(4)),
        ({"SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "8"}, range(8)),
        ({"SLURM_TASKS_PER_NODE": "1"} | EIGHT, range(8)),
        # Fewer that can be seen than the job has on the node.
        (ONE_A_NODE | {"CUDA_VISIBLE_DEVICES": "2,5", "SLURM_GPUS_ON_NODE": "8"}, range(2)),
        (ONE_A_NODE | {"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "8"}, None),
        (ONE_A_NODE | {"SLURM_GPUS_ON_NODE": "1"}, None),
        (ONE_A_NODE, None),
        # One task for each GPU, also if the job requests another number than its step.
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NTASKS_PER_NODE": "8"} | EIGHT, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_NTASKS_PER_NODE": "1"} | EIGHT, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,2"} | EIGHT, None),
        (ONE_A_NODE | EIGHT | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
        (ONE_A_NODE | EIGHT | {"OMPI_COMM_WORLD_LOCAL_RANK": "3"}, None),
        (EIGHT, None),
    ],
)
def test_the_one_task_of_a_node_drives_all_its_gpus(monkeypatch, flags, variables, devices):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "CUDA_"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("JAX_LOCAL_DEVICE_IDS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **how: given.update(how))
    plain = dict.fromkeys(("coordinator", "num_processes", "process_index"))
    shared.join_processes(SimpleNamespace(**{**plain, "heartbeat_timeout_seconds": 100, **flags}))
    assert given["local_device_ids"] == devices


def test_all_that_queue_again_do_so_after_the_same_statuses():
    page = (ROOT / "docs" / "launching.md").read_text()
    again = {
        int(status)
        for row in re.findall(r"^\| ([\d, ]+) \|.*\| yes \|$", page, re.MULTILINE)
        for status in row.split(",")
    }
    assert again == {75, 130, 134, 137, 143}
    (listed,) = re.findall(
        r"recover_on_exit_codes: \[(.*)\]", (FOLDER / "skypilot.yaml").read_text()
    )
    assert {int(status) for status in listed.split(",")} == again
    (cases,) = re.findall(r"([\d |]+)\) ;;", (FOLDER / "slurm.sh").read_text())
    assert {int(status) for status in cases.split("|")} == again


@pytest.mark.process
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


@pytest.mark.process
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
