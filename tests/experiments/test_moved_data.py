"""Data that lie elsewhere than they did are found by a flag, and known by their fingerprint."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import diffjax
from diffjax.conditions import Classes
from diffjax.config_upgrade import upgrade
from diffjax.data import Coarse, digits, image_folder, pairs, translation
from diffjax.errors import UserError
from diffjax.objectives.base import Traits
from diffjax.runs import workdirs
from diffjax.spec import build, from_json, spec, to_json
from experiments import edit, evaluate, find_grid, likelihood, probe, sample, validate
from experiments.flags import cli
from tests.support.old_runs import OLD_RUN


def pictures(folder, shade=0):
    """Twenty grey pictures of ten classes."""
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for i in range(2):
            pixels = np.full((8, 8), 20 * label + 10 * i + shade, np.uint8)
            Image.fromarray(pixels).save(folder / str(label) / f"{i}.png")
    return folder


def move(tmp_path):
    """A run on a folder of pictures, which then was moved; and a folder of others."""
    pictures(tmp_path / "there")
    config = json.loads((OLD_RUN / "config.json").read_text())
    folder = spec(image_folder, path=str(tmp_path / "there"), image_size=8, channels=1)
    config["data"] = json.loads(to_json(folder))
    workdir = shutil.copytree(OLD_RUN, tmp_path / "run")
    (workdir / "config.json").write_text(json.dumps(config))
    data, run = build(folder), json.loads((workdir / "run.json").read_text())
    run["data"] |= {
        "train_sha256": data.train.fingerprint(),
        "test_sha256": data.test.fingerprint(),
    }
    (workdir / "run.json").write_text(json.dumps(run))
    (tmp_path / "there").rename(tmp_path / "here")
    pictures(tmp_path / "other", shade=1)
    return workdir


@pytest.fixture
def moved(tmp_path):
    return move(tmp_path)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Such a run, to be read."""
    workdir = move(tmp_path_factory.mktemp("moved"))
    return workdir, diffjax.load(workdir)


SCRIPTS = [edit, evaluate, likelihood, validate, probe]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_each_command_asks_for_the_flag_and_knows_the_data(script, loaded, capsys, monkeypatch):
    moved, run = loaded
    monkeypatch.setattr(diffjax, "load", lambda workdir, **how: {str(moved): run}[str(workdir)])
    names: Any = {validate: "--workdirs"}
    workdir = f"{names.get(script, '--workdir')}={moved}"

    def said(*flags):
        assert cli.run(script.main, script.FLAGS, usage="", argv=[workdir, *flags]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert f"no folder {moved.parent / 'there'}" in said()
    assert "if the data have moved, set --data_path" in said()
    other = said(f"--data_path={moved.parent / 'other'}")
    assert f"training images of {moved.parent / 'other'} are not those of {moved}" in other


def test_they_are_found_where_they_lie_now(moved):
    run, here = diffjax.load(moved), str(moved.parent / "here")
    assert len(run.dataset(here).train) + len(run.dataset(here).test) == 20
    with pytest.raises(UserError, match="no folder nowhere"):
        run.dataset("nowhere")
    assert "there" in (moved / "config.json").read_text(), "looking changes nothing"
    # A picture of the test set alone was changed.
    data = run.dataset(here)
    test_file = Path(here) / data.test.files[0]  # type: ignore
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(test_file)
    with pytest.raises(UserError, match=r"the testing images of .*/here are not"):
        run.dataset(here)


def test_data_without_a_path_take_none():
    run = diffjax.load(OLD_RUN)
    assert run.dataset().train.fingerprint() == digits().train.fingerprint()
    with pytest.raises(UserError, match="digits reads no path: leave --data_path out"):
        run.dataset("anywhere")


def test_a_path_within_another_spec_is_found(tmp_path):
    here = pictures(tmp_path / "here")
    inner = spec(image_folder, path="there", image_size=8, channels=1)
    data = spec(translation, dataset=inner, change=spec(Coarse)).lock()
    found = workdirs.data_of(tmp_path, data, str(here))
    assert len(found.train) + len(found.test) == 20
    assert data.dataset.path == "there"


def test_sources_of_samples_are_found_as_well():
    """In `sample` and `find_grid`, of runs that start at images."""
    asked = []
    run: Any = SimpleNamespace(
        parts=SimpleNamespace(
            wired=SimpleNamespace(
                objective=SimpleNamespace(traits=Traits(starts_at_source=True)),
                condition=Classes(10),
            )
        ),
        dataset=lambda path: asked.append(path) or translation(digits(), Coarse(2)),
    )
    labels, source, _ = sample.wanted(run, None, 3, "here")
    assert asked == ["here"]
    assert len(labels) == len(source) == 3  # type: ignore
    assert "data_path" in find_grid.FLAGS


def test_training_on_notes_the_new_path_once_the_data_are_known(moved):
    """`claim` comes before the fingerprint is compared, `record_run` after it."""
    here = str(moved.parent / "here")
    config = from_json((moved / "config.json").read_text(), upgrade=upgrade)
    with config.unlocked():
        config.data.path = here
        config.mesh.data = 1
    before = json.loads((moved / "config.json").read_text())
    workdirs.claim(moved, config)
    assert json.loads((moved / "config.json").read_text()) == before
    parts: Any = replace(diffjax.load(moved).parts, config=config)
    workdirs.record_run(moved, parts, build(config.data), "")
    after = json.loads((moved / "config.json").read_text())
    assert after == upgrade(before) | {"data": before["data"] | {"path": here}}
    assert (
        diffjax.load(moved).dataset().train.fingerprint()
        == image_folder(here, 8, 1).train.fingerprint()
    )


def test_paths_within_specs_are_a_place_too():
    inner = json.loads(to_json(spec(image_folder, path="a")))
    outer = json.loads(to_json(spec(pairs, dataset=spec(image_folder, path="a"), path="b")))
    for data in (inner, {"data": inner, "_target_": "t"}, outer):
        text = json.dumps(data)
        there = json.loads(text.replace('"a"', '"c"').replace('"b"', '"d"'))
        assert data != there
        same = [workdirs._without_place({"data": each}) for each in (data, there)]
        assert same[0] == same[1]
        assert "path" not in json.dumps(same[0]).replace("image_folder", "")
