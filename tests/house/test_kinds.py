"""What a setting may be: its kind and its range, declared where its field is."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from diffjax import choices
from diffjax.data import Augment
from diffjax.errors import UserError
from diffjax.kinds import Decay, Limit, Range, complaint
from diffjax.likelihood.ode import Hutchinson, TraceEstimator
from diffjax.models import DiT, UNet
from diffjax.objectives.denoising import Denoising
from diffjax.objectives.derivatives import EXACT, Derivative
from diffjax.objectives.distillation.flow_anchored import FlowAnchored
from diffjax.objectives.few_step.flow_maps import Lagrangian, Rule
from diffjax.optimizers.adam import AdamW
from diffjax.optimizers.descent import descent
from diffjax.optimizers.schedules import Cosine
from diffjax.process import paths, targets, times, weights
from diffjax.process.paths import Path
from diffjax.process.weights import Weight
from diffjax.sampling.grids import Grid, Power
from diffjax.sampling.guidance import Limited
from diffjax.sampling.sample import Recipe
from diffjax.sampling.solvers import Solver, heun
from diffjax.settings import check_settings
from diffjax.spec import build, spec
from diffjax.training.nonfinite import NonFinite

# Every part that has a name, and those of every config, with the arguments of training.
ROWS = {
    f"{table}-{name}": row
    for table, rows in {**choices.AXES, "solver": choices.SOLVERS, "grid": choices.GRIDS,
                        "guidance": choices.GUIDANCE, "wrapper": choices.WRAPPERS,
                        **choices.TRAINING_AXES}.items()
    for name, row in rows.items()
    if table != "loss"
} | {
    "augment": spec(Augment),
    "nonfinite": spec(NonFinite),
    "dit": spec(DiT),
    "unet": spec(UNet),
}  # fmt: skip
RUNTIME = {"dit": {"num_classes": 3}, "unet": {"num_classes": 3}}


def numbers_in(config, place=()):
    """Where a spec holds numbers: keys one after the other."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from numbers_in(value, (*place, key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield (*place, key)


def with_value(config, place, value):
    changed = config.to_dict()
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed


@pytest.mark.parametrize("name", ROWS)
def test_every_part_takes_its_defaults_and_no_number_is_nan_or_text(name):
    row = ROWS[name]
    around = {"objective": None} if name.startswith("wrapper-") else {}
    if name.startswith("optimizer-"):
        around = {"num_steps": 10}
    runtime = RUNTIME.get(name, around)
    build(row, **runtime)
    for place in numbers_in(row):
        for wrong in (math.nan, "1", None, (1,)):
            with pytest.raises(UserError, match=rf"{place[-1]}=.* must be"):
                build(with_value(row, place, wrong), **runtime)


def optimizer_of(**settings):
    return build(spec(descent, **settings), num_steps=10)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        # As they were tried: probabilities from 0 to 1, decays to below 1, sizes above 0.
        (lambda: build(spec(AdamW, b2=2)), "b2=2.0 must be at least 0 and below 1, like 0.999"),
        (lambda: build(spec(AdamW, b1=1.0)), "b1=1.0 must be at least 0 and below 1"),
        (lambda: build(spec(AdamW, eps=-1.0)), "eps=-1.0 must be above 0"),
        (lambda: optimizer_of(clip_norm=0.0), "clip_norm=0.0 must be above 0"),
        (lambda: optimizer_of(clip_norm=-1.0), "clip_norm=-1.0 must be above 0"),
        (lambda: optimizer_of(learning_rate=-1e-3), "learning_rate=-0.001 must be at least 0"),
        (lambda: optimizer_of(learning_rate=math.inf), "learning_rate=inf must be finite"),
        (lambda: build(spec(Cosine, final_fraction=-1.0)), "final_fraction=-1.0 must be"),
        (lambda: optimizer_of(warmup_steps=2.5), "warmup_steps=2.5 must be a whole number"),
        (lambda: build(spec(paths.Linear, t_min=-0.1)), "t_min=-0.1 must be at least 0"),
        (lambda: build(spec(paths.Linear, t_noise=1.5)), "t_noise=1.5 must be above 0 and at most"),
        (lambda: build(spec(Augment, flip_probability=1.5)), "flip_probability=1.5 must be at"),
    ],
)  # fmt: skip
def test_a_number_out_of_its_range_is_refused_by_its_name(make, said):
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        make()


def test_no_clipping_is_an_infinite_bound():
    assert optimizer_of(clip_norm=math.inf)
    assert complaint("x", math.inf, Limit[float]) is None


def test_ends_of_a_path_that_do_not_go_together_are_refused():
    """In range each, but a path that begins where it ends has nothing between."""
    path = build(spec(paths.Linear, t_min=1.0))
    with pytest.raises(UserError, match="t_min must be below t_noise"):
        targets.undecodable(path, targets.Velocity())
    # Rounding leaves less than no signal at the end of this one.
    assert targets.undecodable(paths.Cosine(t_noise=1.0), targets.Velocity()) is None
    rising = build(choices.PATHS["ve"].copy_and_resolve_references())
    assert targets.undecodable(rising, targets.F()) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"condition_dropout": 1.5}, "condition_dropout=1.5 must be at least 0 and at most 1"),
        ({"condition_dropout": -0.1}, "condition_dropout=-0.1 must be at least 0 and at most 1"),
        ({"condition_dropout": math.nan}, "condition_dropout=nan must be at least 0 and at most 1"),
        ({"condition_dropout": {"text": 1.5}}, "condition_dropout.text=1.5 must be at le"),
        ({"ema_decays": 0.999}, r"config.ema_decays=0.999 must be a list, as \(0.999,\)"),
        ({"ema_decays": (0.9, 1.0)}, r"config.ema_decays\[1\]=1.0 must be at least 0 and below 1"),
        ({"ema_lengths": (0.05, 0.3)}, r"config.ema_lengths\[1\]=0.3 must be above 0 and at most"),
        ({"ema_lengths": (0.0,)}, r"config.ema_lengths\[0\]=0.0 must be above 0"),
        ({"snapshot_every_steps": 0}, "config.snapshot_every_steps=0 must be at least 1"),
        ({"wrappers": 1e9}, r"config.wrappers=1000000000.0 must be a list"),
        ({"batch_size": 0}, "config.batch_size=0 must be at least 1"),
        ({"num_steps": 2.5}, "config.num_steps=2.5 must be a whole number"),
        ({"num_steps": True}, "config.num_steps=True must be a whole number"),
        ({"weights": 3}, "config.weights=3 must be text"),
        ({"seed": -1}, "config.seed=-1 must be at least 0 and at most 4294967295"),
        ({"seed": 2**32}, "config.seed=4294967296 must be at least 0 and at most 4294967295"),
        ({"evaluation": {"batch_size": 0}}, "config.evaluation.batch_size=0 must be at least 1"),
        ({"evaluation": {"batch_size": -5}}, "config.evaluation.batch_size=-5 must be at least 1"),
        ({"evaluation": {"guidance_scales": (math.nan,)}}, r"guidance_scales\[0\]=nan must be fin"),
        ({"evaluation": {"guidance_scales": (1, "abc")}}, r"guidance_scales\[1\]='abc' must be a"),
        ({"evaluation": {"weights": (3,)}}, r"config.evaluation.weights\[0\]=3 must be text"),
        ({"evaluation": {"weights": "live"}}, r"evaluation.weights='live' must be a list, as \('l"),
        ({"evaluation": {"num_samples": 2}}, "config.evaluation.num_samples=2 must be at least 3"),
        ({"evaluation": 3}, "config.evaluation=3 must be a group of settings"),
    ],
)  # fmt: skip
def test_settings_of_another_kind_or_out_of_range_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        check_settings(ConfigDict(changes))


def test_what_a_config_lacks_or_has_beside_is_passed_over():
    check_settings(ConfigDict({"num_steps": 3, "own": "anything"}))


DECLARED = {"path": Path, "target": targets.Target, "weight": Weight, "times": times.Times,
            "grid": Grid, "solver": Solver, "derivative": Derivative, "rule": Rule,
            "trace": TraceEstimator}  # fmt: skip
OBJECTS = {"path": paths.Linear(), "target": targets.V(), "weight": weights.SNR(),
           "times": times.Uniform(), "grid": Power(), "solver": heun(),
           "derivative": EXACT, "rule": Lagrangian(), "trace": Hutchinson()}  # fmt: skip


@pytest.mark.parametrize("kind", DECLARED)
@pytest.mark.parametrize("other", OBJECTS)
def test_a_part_of_another_kind_is_known_by_what_it_is_called_with(kind, other):
    assert (complaint("x", OBJECTS[other], DECLARED[kind]) is None) == (kind == other)


def test_a_part_of_another_kind_is_refused_by_what_the_field_declares():
    config = spec(Denoising, weight=spec(paths.Linear), times=spec(times.Uniform))
    said = r"weight=Linear\(t_min=0.001, t_noise=1.0\) must map \(Coeffs, Mix\) to Array"
    with pytest.raises(UserError, match=said):
        build(config, path=None, precond=None)
    facm = spec(FlowAnchored, times=spec(times.Uniform), derivative=spec(Limited))
    with pytest.raises(UserError, match=r"derivative=Limited.* must be a Derivative"):
        build(facm, path=None, precond=None)
    with pytest.raises(UserError, match="solver='heun' must be a Solver"):
        build(spec(Recipe, solver="heun", grid=spec(Power)))
    with pytest.raises(UserError, match=r"config.path=Uniform.* must be a Path"):
        build(spec(times.Uniform), Path, "config.path")


def own_weight(c, k):
    return 1.0


def annotated_by_numpy(c: np.ndarray, k: np.ndarray) -> np.ndarray:
    return c


def test_own_parts_may_say_less():
    """Without annotations only the number of arguments counts; arrays are alike."""
    assert complaint("x", own_weight, Weight) is None
    assert complaint("x", own_weight, targets.Target) is not None
    assert complaint("x", annotated_by_numpy, Weight) is not None  # arrays are no coefficients


@given(st.floats(), st.sampled_from(["[0, 1]", "[0, 1)", "(0, inf)", "(0, inf]", "(-inf, inf)"]))
def test_an_interval_holds_what_mathematics_says(number, text):
    low, high = Range(text).ends
    expected = (low < number < high) or (
        (number == low and text[0] == "[") or (number == high and text[-1] == "]")
    )
    assert (number in Range(text)) == expected


def test_arrays_are_not_looked_into():
    assert complaint("x", np.float32(0.5), Decay[float]) is None
    assert complaint("x", 10**400, int) is None  # beyond floats
    assert complaint("x", jnp.array(7.0), Decay[float]) is None
