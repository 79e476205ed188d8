"""tools/accelerator_check: its script can be read, and its small size runs on a CPU."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tools import accelerator_check

SCRIPT = Path(__file__).parents[2] / "tools" / "accelerator_check.sh"


def test_the_limits_of_all_sections_are_below_ten_minutes():
    lines = [line for line in SCRIPT.read_text("utf-8").splitlines() if line.startswith("section ")]
    assert len(lines) == 7
    assert sum(int(line.split('"')[2].split()[0]) for line in lines) < 600


def test_attention_with_equal_logits_is_the_mean():
    v = np.random.default_rng(0).normal(size=(2, 5, 3, 4))
    found = accelerator_check.in_float64(np.zeros_like(v), v, v)
    np.testing.assert_allclose(found, np.broadcast_to(v.mean(1, keepdims=True), v.shape))
    assert accelerator_check._error([1.0, -3.5], [1.0, -4.0]) == 0.125


@pytest.mark.parametrize(
    ("kind", "platform", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu", "h100"),
        ("TPU v5 lite", "tpu", "v5e"),
        ("TPU v5", "tpu", "v5p"),
        ("cpu", "cpu", "cpu"),
    ],
)
def test_a_known_device_is_one_of_the_planner(kind, platform, name):
    device = SimpleNamespace(device_kind=kind, platform=platform)
    assert accelerator_check.here(device).chip.name == name


@pytest.mark.process
def test_a_wrong_size_is_refused_and_the_script_can_be_read(tmp_path):
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    done = subprocess.run(
        [str(SCRIPT), str(tmp_path / "report.md")], env={"SIZE": "huge", "PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 2


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("section", ["attention", "ensembles", "plans", "exported"])
def test_each_section_runs_in_its_small_size(section, capsys):
    assert accelerator_check.main(["--size=small", section]) == 0
    assert "|" in capsys.readouterr().out or section == "exported"
