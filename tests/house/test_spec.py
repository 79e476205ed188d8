"""Configs as data: specs, building, names and JSON."""

import json
from typing import Any

import pytest
from ml_collections import ConfigDict

from diffjax import choices, lookup
from diffjax.errors import UserError
from diffjax.models.dit import DiT
from diffjax.objectives.wrappers import Importance
from diffjax.process import paths
from diffjax.process.times import LogitNormal
from diffjax.sampling.sample import Recipe
from diffjax.spec import build, from_json, parse_arguments, spec, to_json


def needs_runtime(shared, scale: float = 2.0, name: str = "n"):
    return shared, scale, name


def test_every_default_is_visible_and_overridable():
    config = spec(paths.LinearBeta, beta_max=10.0)
    assert config.to_dict() == {
        "_target_": "diffjax.process.paths:LinearBeta",
        "beta_min": 0.1,
        "beta_max": 10.0,
        "t_min": 1e-3,
        "t_noise": 1.0,
    }
    config.t_min = 0.01
    assert build(config) == paths.LinearBeta(beta_max=10.0, t_min=0.01)


def test_runtime_arguments_are_left_to_build():
    config = spec(needs_runtime)
    assert "shared" not in config
    assert build(config, shared="here") == ("here", 2.0, "n")
    with pytest.raises(UserError, match="needs 'shared'"):
        build(config)
    with pytest.raises(UserError, match="did you mean 'shared'"):
        build(config, shred=1)


def test_specs_nest_in_dicts_and_tuples():
    config = ConfigDict({"paths": (spec(paths.Linear), spec(paths.Cosine)), "number": 3})
    assert build(config) == {"paths": (paths.Linear(), paths.Cosine()), "number": 3}


def test_flax_wiring_is_no_hyper_parameter():
    config = spec(DiT)
    assert not {"parent", "name", "num_classes"} & set(config)
    assert build(config, num_classes=3).num_classes == 3


def test_mistakes_name_the_nearest():
    with pytest.raises(UserError, match="no parameter 'beta_maks'; did you mean 'beta_max'"):
        spec(paths.LinearBeta, beta_maks=1.0)
    with pytest.raises(UserError, match="can't be imported by name"):
        spec(lambda: None)
    config = spec(paths.Linear)
    config.t_nois = 1.0
    with pytest.raises(UserError, match="did you mean 't_noise'"):
        build(config)
    config = ConfigDict({"_target_": "diffjax.process.paths:Cosin"})
    with pytest.raises(UserError, match="did you mean 'Cosine'"):
        build(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objectiv=ddpm", "did you mean 'objective'"),
        ("ddpm", "axis=choice"),
        ("model=a,model=b", "twice"),
    ],
)
def test_arguments_are_checked(text, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(text, "objective", "model")


def test_an_unknown_choice_names_the_nearest():
    config = ConfigDict({"name": "x"})
    with pytest.raises(UserError, match="no objective is called 'dppm'; did you mean 'ddpm'"):
        lookup.set_axes(config, "objective=dppm", {"dit": spec(DiT)}, model="dit")


def test_tables_are_copied_not_shared():
    config = ConfigDict({"name": "x"})
    lookup.set_axes(config, "", {"dit": spec(DiT)}, model="dit")
    config.path.t_noise = 0.5
    assert choices.PATHS["linear"].t_noise == 1.0


def test_json_round_trip_gives_the_same_objects():
    config = ConfigDict(
        {
            "sampling": spec(
                Recipe, solver=choices.SOLVERS["heun"], grid=choices.GRIDS["quadratic"]
            ),
            "sizes": (1, 2),
            "wrappers": (spec(Importance, proposal=choices.TIMES["logit_normal"]),),
        }
    )
    again = from_json(to_json(config))
    assert to_json(again) == to_json(config)
    assert again.sizes == (1, 2)
    (wrapper,) = again.wrappers
    assert wrapper.is_locked
    inner: Any = None
    assert build(wrapper, objective=inner) == Importance(inner, LogitNormal())
    assert build(again.sampling).grid == build(config.sampling).grid


@pytest.mark.parametrize(
    "location",
    ["os:system", "subprocess:run", "diffjaxx:run", 3, "diffjax.runs.workdirs:subprocess"],
)
def test_a_saved_config_runs_no_foreign_code(location):
    text = json.dumps({"a": [{"_target_": location}]})
    with pytest.raises(UserError):
        build(from_json(text))


@pytest.mark.parametrize("text", ["", "[1]", '{"a":'])
def test_what_is_no_config_is_refused(text):
    with pytest.raises(UserError, match="not a saved config"):
        from_json(text)
