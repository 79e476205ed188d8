"""Runs of earlier versions, which have to be readable from now on.

Each folder of tests/old_runs was left by `experiments.train` at the commit that its run.json names
(`git_revision`), with the smallest network there is; `samples.npz` holds what `diffjax.load(…)
.sample` gave then. A new one is made whenever what a run leaves behind changes.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import diffjax
from diffjax.errors import UserError
from diffjax.evaluation.report import write_report

RUNS = sorted(path for path in (Path(__file__).parent / "old_runs").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", RUNS, ids=lambda path: path.name)
def test_it_is_read_and_samples_as_it_did(folder):
    run = diffjax.load(folder)
    expected = np.load(folder / "samples.npz")
    assert run.step == expected["step"]
    images = run.sample(expected["labels"], seed=int(expected["seed"]))
    # Other processors round differently.
    np.testing.assert_allclose(images, expected["images"], atol=1e-4)


@pytest.mark.parametrize("folder", RUNS, ids=lambda path: path.name)
def test_its_page_can_be_made(folder, tmp_path):
    for name in ("config.json", "run.json", "metrics.jsonl", "evaluation.json"):
        if (folder / name).exists():
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert write_report(tmp_path).is_file()


def test_a_run_that_names_what_there_is_no_more_says_which_version_reads_it(tmp_path):
    source = RUNS[-1]
    config = json.loads((source / "config.json").read_text())
    config["model"]["width_of_old"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "run.json").write_bytes((source / "run.json").read_bytes())
    run = json.loads((source / "run.json").read_text())
    with pytest.raises(UserError, match="has no parameter 'width_of_old'") as caught:
        diffjax.load(tmp_path)
    assert f"diffjax {run['versions']['diffjax']} at {run['git_revision'][:12]}" in str(
        caught.value
    )
