"""What Python calls are given is of the kind that they declare, or is refused in one line."""

import pytest

import diffjax
from configs import digits as digits_config
from diffjax.data import digits
from diffjax.errors import UserError
from diffjax.host.watchdog import Watchdog
from diffjax.loop.profile import Profile
from diffjax.runs.measuring.likelihoods import WantedBits, measure_likelihood
from diffjax.runs.measuring.measure import Wanted
from diffjax.spec import TARGET, build
from tests.support.old_runs import OLD_RUN


@pytest.fixture(scope="module")
def run(old_run):
    return old_run


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"workdir": 3}, "workdir=3 must be text"),
        ({"workdir": None}, "workdir=None must be text"),
        ({"mesh": 3}, "mesh=3 must be a Mesh"),
        ({"weights": ["live"]}, r"weights=\['live'\] must be text"),
        ({"allowed_packages": "mine"}, r"allowed_packages='mine' must be a list, as \('mine',\)"),
        ({"workdir": "~nobody-of-that-name"}, "there is no run in ~nobody"),
    ],
)
def test_loading(how, said):
    with pytest.raises(UserError, match=said):
        diffjax.load(**({"workdir": OLD_RUN} | how))


def bits(run, *given, **how):
    return measure_likelihood(run, digits(), WantedBits(*given, **how))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda run: run.sample(1, source=3), "source=3 must be a ndarray"),
        (lambda run: run.sample(1, solver=3), "solver=3 must be text"),
        (lambda run: run.sample(1, grid=3), "grid=3 must be text"),
        (lambda run: run.sample(1, guidance=3), "guidance=3 must be text"),
        (lambda run: run.sample(1, against={}), "against=, a negative condition: .* not {}"),
        (lambda run: run.sample(1, weights=3), "weights=3 must be text"),
        (lambda run: run.sample(1, guidance_scale="2"), "guidance_scale='2' must be a number"),
        (lambda run: run.sample(1, num_steps=10**7), r"num_steps=10000000 must be .* 1000000"),
        (lambda run: run.sample(1, guidance_scale=10**400), "guidance_scale must be finite"),
        (lambda run: run.evaluate(out=3), "out=3 must be text"),
        (lambda run: run.weights(3), "name=3 must be text"),
        (lambda run: run.model(3), "weights=3 must be text"),
        (lambda run: run.dataset(3), "path=3 must be text"),
        (lambda run: run.sample(1, batch_size="4"), "batch_size='4': it is a whole number from 1"),
        (
            lambda run: bits(run, options={"num_step": 3}),
            "no option of ode is called 'num_step'; did you mean 'num_steps'",
        ),
        (lambda run: bits(run, options=3), "options=3 must be a Mapping"),
        (
            lambda run: bits(run, "vlb", {"num_times": 0}),
            "num_times=0 must be at least 2",
        ),
        (lambda run: bits(run, ["ode"]), r"no method is called \['ode'\]"),
        (lambda run: bits(run, seed=()), "seed=.. must be a whole number"),
    ],
)
def test_what_a_run_offers(run, call, said):
    with pytest.raises(UserError, match=said) as caught:
        call(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"solvers": 3}, r"solvers=3 must be a list, as \(3,\)"),
        ({"solvers": "heun"}, r"solvers='heun' must be a list, as \('heun',\)"),
        ({"grids": [None]}, r"grids\[0\]=None must be text"),
        ({"num_steps": [0]}, r"num_steps\[0\]=0 must be at least 1"),
        ({"num_samples": 2}, "num_samples=2 must be at least 3"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"labels": 3}, "labels=3 must be text"),
        ({"guidance_scales": [float("nan")]}, r"guidance_scales\[0\]=nan must be finite"),
        ({"seeds": [0.5]}, r"seeds\[0\]=0.5 must be a whole number"),
    ],
)
def test_what_is_evaluated(how, said):
    with pytest.raises(UserError, match=said):
        Wanted(**how)


def test_any_sequence_will_do():
    assert Wanted(seeds=range(3), solvers=["heun"], num_steps=(2,)).seeds == range(3)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"config": {"name": "mine"}}, "must be a ConfigDict"),
        ({"workdir": 3}, "workdir=3 must be text"),
        ({"workdir": ""}, "workdir='' is no folder"),
        ({"watchdog": 3}, "watchdog=3 must be a Watchdog"),
        ({"profile": (1, 2)}, r"profile=\(1, 2\) must be a Profile"),
    ],
)
def test_training(tmp_path, how, said):
    given = {"config": digits_config.get_config(), "workdir": tmp_path / "run"}
    with pytest.raises(UserError, match=said):
        diffjax.train(**(given | how))
    assert not (tmp_path / "run").exists()


def test_values_of_their_own_are_checked_when_they_are_made():
    with pytest.raises(UserError, match="seconds='x' must be a number"):
        Watchdog(seconds="x")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"first=0\.5 must be a whole number"):
        Profile(0.5, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["", ":", ".x:y", "..:x", 3, None, "no.such:thing"])
def test_a_spec_that_names_nothing(target):
    with pytest.raises(UserError, match=r"config names|has no"):
        build({TARGET: target})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("mesh", 3, "config.mesh=3 must be a group of settings"),
        ("mesh", {"data": "all"}, "config.mesh.data='all' must be a whole number"),
        ("evaluation", (1,), r"config.evaluation=\(1,\) must be a group of settings"),
        ("expected", 3, "config.expected=3 must be a group of settings"),
        ("model", 3, "config.model=3 must be a Module, or the spec of one"),
        ("optimizer", "adam", "config.optimizer='adam' must be an Optimizer, or the spec of one"),
        ("sharding_rules", 3, r"config.sharding_rules=3 must be a list, as \(3,\)"),
        ("sharding_rules", ("k",), r"sharding_rules\[0\]='k' must be a list"),
        ("ema_decays", 0.9, r"config.ema_decays=0.9 must be a list, as \(0.9,\)"),
        ("name", 3, "config.name=3 must be text"),
    ],
)
def test_a_setting_of_another_kind(tmp_path, name, value, said):
    config = digits_config.get_config()
    with config.ignore_type():
        config[name] = value
    with pytest.raises(UserError, match=said):
        diffjax.train(config, tmp_path / "run")


@pytest.mark.parametrize(
    "place",
    ["seed", "model", "mesh", "log_every_steps", "weights", "evaluation.num_samples",
     "evaluation.solvers"],
)  # fmt: skip
def test_a_setting_that_is_missing_is_named_before_the_first_step(tmp_path, place):
    config = digits_config.get_config()
    *group, key = place.split(".")
    delattr(config[group[0]] if group else config, key)
    with pytest.raises(UserError, match=rf"there is no config\.{place}"):
        diffjax.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
