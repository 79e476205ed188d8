"""A setting that there is not is refused from Python as on the command line."""

import json
import shutil

import jax
import numpy as np
import pytest

import diffjax
from diffjax import config_files
from diffjax.autoencoders.settings import Settings as AutoencoderSettings
from diffjax.errors import UserError
from diffjax.runs.checks import check_config
from diffjax.settings import Evaluation, Expected, Mesh, Settings
from experiments.flags import cli
from tests.support.old_runs import OLD_RUN


@pytest.mark.parametrize(
    ("group", "key", "said"),
    [
        ("", "num_stepps", "no setting config.num_stepps; did you mean 'num_steps'"),
        ("evaluation", "solver", "no setting config.evaluation.solver; did you mean 'solvers'"),
        ("mesh", "fdsp", "no setting config.mesh.fdsp; did you mean 'fsdp'"),
        ("sampling", "num_stepps", "has no parameter 'num_stepps'; did you mean 'num_steps'"),
        ("augment", "flip", "has no parameter 'flip'"),
        ("optimizer", "lerning_rate", "did you mean 'learning_rate'"),
    ],
)
def test_a_mistyped_key_is_refused_before_anything_is_written(tmp_path, group, key, said):
    config = config_files.load("configs/digits.py")
    (config[group] if group else config)[key] = 3
    with pytest.raises(UserError, match=said):
        diffjax.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_setting_of_every_config_is_known():
    """And the list has none that is in no config."""
    groups = {"": Settings, "evaluation": Evaluation, "expected": Expected, "mesh": Mesh}
    seen: dict[str, set[str]] = {group: set() for group in groups}
    for name in cli.config_names():
        if name == "finetune":  # Its settings are those of the pipeline that it begins with.
            continue
        config = config_files.load(f"configs/{name}.py")
        if "autoencoder" in config:  # Of the training of one, with settings of its own.
            assert set(config) == {*AutoencoderSettings.__annotations__}
            continue
        for group, found in seen.items():
            found |= set(config.get(group, {}) if group else config)
    # That of a text, by which a plan goes (docs/planning.md): no data set of a config has one yet.
    seen["expected"].add("condition")
    assert seen == {group: {*known.__annotations__} for group, known in groups.items()}


def test_a_run_that_was_saved_with_a_setting_of_its_own_is_read(tmp_path):
    """It was trained; nothing is to be refused any more."""
    copy = shutil.copytree(OLD_RUN, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text()) | {"note": "mine"}
    (copy / "config.json").write_text(json.dumps(config))
    loaded = diffjax.load(copy)
    assert loaded.config.note == "mine"
    with pytest.raises(UserError, match=r"no setting config\.note"):
        check_config(loaded.config)
    jax.tree.map(np.testing.assert_array_equal, loaded.weights(), diffjax.load(OLD_RUN).weights())
