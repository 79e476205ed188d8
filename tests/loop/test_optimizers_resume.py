"""Runs with other optimizers than AdamW: what they keep survives a checkpoint, bit for bit."""

import shutil

import pytest

from diffjax.loop import loop
from tests.support.tiny_run import arrays_of, assert_same, tiny_config, without_pictures


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["muon", "schedule_free"])
def test_a_resumed_run_is_an_undisturbed_one(name, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    config, whole = tiny_config(f"model=tiny,optimizer={name}"), tmp_path / "whole"
    loop.train(config, whole)
    resumed = shutil.copytree(whole, tmp_path / "resumed")
    for step in (4, 6):
        shutil.rmtree(resumed / "checkpoints" / str(step))
    loop.train(config, resumed)
    assert_same(arrays_of(resumed), arrays_of(whole), rtol=0, atol=0)
