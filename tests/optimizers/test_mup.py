"""muP: factors by shapes, initial deviations, equal bits at the base width, sizes of steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.conditions import of_classes
from diffjax.data import digits
from diffjax.errors import UserError
from diffjax.models.dit import DiT
from diffjax.models.layers.common import HIDDEN, as_of_head_width
from diffjax.models.uvit import UViT
from diffjax.optimizers.descent import descent
from diffjax.optimizers.muon import Muon
from diffjax.optimizers.mup import by_width, rate_factors
from diffjax.runs.setup import set_up
from diffjax.spec import spec
from diffjax.studies.learning_rates import Losses, final_losses, of_width, plot, table
from diffjax.wiring import wire
from experiments import learning_rates
from experiments.flags import cli
from tests.support.compiling import FAST
from tests.support.messages import error_line
from tests.support.tiny_network import Tiny
from tests.support.tiny_run import tiny_config

WIDE = {"hidden_size": 64, "depth": 1, "num_heads": 4, "patch_size": 4}


def config_of(arguments="", **model):
    config = tiny_config(arguments)
    config.unlock()
    config.model.update(dropout=0.0, **model)
    return config


def initial(network, seed=0):
    x, t, label = jnp.ones((1, 8, 8, 1)), jnp.ones(1), jnp.zeros(1, jnp.int32)
    return jax.jit(network.init)(jax.random.key(seed), x, t, label)["params"]


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_rates_of_kernels_fall_with_their_inputs_and_others_stay(scan):
    """Four times the width: 1/4 for each kernel that reads tokens, by Yang et al.'s table 8."""
    config = config_of(**WIDE, base_width=16, scan=scan)
    factors = wire(config, (8, 8, 1), of_classes(10)).rate_factors
    block = factors["blocks" if scan else "block_0"]
    for kernel in (
        block["attention"]["qkv"], block["attention"]["out"], block["mlp"]["up"],
        block["mlp"]["down"], block["modulation"], factors["final_modulation"],
        factors["final_out"], factors["conditioning"]["out"],
    ):  # fmt: skip
        assert kernel == {"bias": 1.0, "kernel": 0.25}
    # Patches and frequencies are as many in each width.
    for name in ("patch_embedding", "conditioning"):
        inner = factors[name] if name == "patch_embedding" else factors[name]["hidden"]
        assert inner == {"bias": 1.0, "kernel": 1.0}
    assert factors["conditioning"]["label"] == {"embedding": 1.0}
    config.model.base_width = 0
    assert wire(config, (8, 8, 1), of_classes(10)).rate_factors is None


@pytest.mark.thorough
def test_initial_deviations_are_those_of_the_exponents():
    """Constant where inputs do not grow, 1/√width where they do, from the base network's."""
    wide = initial(DiT(3, **WIDE, base_width=16))
    narrow = initial(DiT(3, **{**WIDE, "hidden_size": 16, "num_heads": 1}))
    # Xavier's variance is 2/(inputs + outputs), with 16 pixels of a patch.
    expected = np.sqrt(2 / (16 + 16))
    bound = np.abs(wide["patch_embedding"]["kernel"]).max()
    assert 0.98 * np.sqrt(3) * expected < bound <= np.sqrt(3) * expected
    assert np.std(wide["conditioning"]["hidden"]["kernel"]) == pytest.approx(0.02, rel=0.02)
    assert np.std(wide["conditioning"]["out"]["kernel"]) == pytest.approx(0.01, rel=0.05)
    for of in (lambda p: p["attention"]["qkv"], lambda p: p["mlp"]["down"]):
        ratio = np.std(of(wide["block_0"])["kernel"]) / np.std(of(narrow["block_0"])["kernel"])
        assert ratio == pytest.approx(0.5, rel=0.1)


@pytest.mark.thorough
def test_layers_that_do_not_know_their_width_begin_smaller():
    """Of U-ViT, whose blocks begin with deviations of 0.02 at any width."""
    sizes = {"hidden_size": 64, "depth": 1, "num_heads": 4, "patch_size": 4}
    params = initial(UViT(3, **sizes, base_width=16))
    for layer in ("qkv", "out"):
        kernel = params["block_0"]["attention"][layer]["kernel"]
        assert np.std(kernel) == pytest.approx(0.01, rel=0.05)
    assert np.std(params["patch_embedding"]["kernel"]) == pytest.approx(0.02, rel=0.1)


def test_logits_of_heads_that_grow_are_divided_by_their_width():
    """Of heads four times as wide the queries are half as long; of equal ones nothing changes."""
    q = np.random.default_rng(0).normal(size=(1, 2, 1, 16)).astype(np.float32)
    np.testing.assert_allclose(as_of_head_width(jnp.asarray(q), 4), q / 2)
    assert all(as_of_head_width(q, base) is q for base in (0, 16))


def steps_of(config, count=3):
    """Parameters after some steps of a run's optimizer with fixed gradients."""
    setup = set_up(config, (8, 8, 1), of_classes(10))
    params = jax.jit(setup.wired.init)(jax.random.key(0))
    rule = setup.fitted(setup.optimizer).transform

    @jax.jit
    def run(params):
        state = rule.init(params)
        for i in range(count):
            gradient = jax.tree.map(lambda x, i=i: jnp.cos(x + i), params)
            updates, state = rule.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    return jax.device_get(run(params))


@pytest.mark.thorough
def test_a_network_of_the_base_width_trains_bit_by_bit_as_without():
    sizes = {"base_head_width": 8, "hidden_size": 16, "num_heads": 2}
    with_it, without = (
        steps_of(config_of(base_width=base_width, **sizes)) for base_width in (16, 0)
    )
    jax.tree.map(np.testing.assert_array_equal, with_it, without)


@pytest.mark.thorough
def test_steps_are_those_of_adam_times_the_factors():
    params = {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}
    base = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    plain = descent(10, learning_rate=1e-2, warmup_steps=0)
    scaled = by_width(plain, rate_factors(params, base))
    gradient = jax.tree.map(jnp.cos, params)
    state = plain.transform.init(params)
    step, _ = plain.transform.update(gradient, state, params)
    found: Any
    step: Any
    found, after = scaled.transform.update(gradient, scaled.transform.init(params), params)
    np.testing.assert_allclose(found["kernel"], step["kernel"] / 4, rtol=1e-6)
    np.testing.assert_array_equal(found["bias"], step["bias"])
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("arguments", "model", "said"),
    [
        ("optimizer=muon", {"base_width": 8}, "muP has factors for the rates of adamw, adam and"),
        pytest.param(
            "",
            {"base_width": 12},
            "base_width=12 is no multiple of the 8 numbers of a head",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "",
            {"base_width": 8, "base_head_width": 3},
            "no multiple of the 3 numbers",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_what_has_no_rule_is_refused_in_one_line(arguments, model, said):
    with pytest.raises(UserError, match=said):
        set_up(config_of(arguments, **model), (8, 8, 1), of_classes(10))
    assert not descent(10, Muon()).steps_of_rate


@pytest.mark.thorough
def test_a_part_of_the_parameters_has_their_factors():
    config = config_of(hidden_size=32, base_width=16)
    config.trainable = "*attention*"
    setup = set_up(config, (8, 8, 1), of_classes(10))
    params = setup.abstract.params
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    rule = setup.fitted(setup.optimizer).transform
    updates, _ = rule.update(zeros, rule.init(zeros), zeros)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


WIDTHS = (32, 64, 128)
STEPS = 3


def changes(width: int, base_width: int) -> list[float]:
    """How far hidden tokens and outputs move in some steps, root mean squares a number."""
    config = config_of(hidden_size=width, num_heads=2, depth=2, patch_size=4, hidden_depths=(2,))
    config.model.update(base_width=base_width, base_head_width=base_width // 2)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=0, clip_norm=1e6)
    setup = set_up(config, (8, 8, 1), of_classes(10))
    wired, rule = setup.wired, setup.fitted(setup.optimizer).transform
    random = np.random.default_rng(0)
    x, eps = (jnp.asarray(random.normal(size=(16, 8, 8, 1)), jnp.float32) for _ in range(2))
    t, labels = jnp.linspace(10.0, 990.0, 16), jnp.arange(16) % 10

    def outputs(params) -> tuple[Any, Any]:
        out, sown = wired.network.apply({"params": params}, x, t, labels, mutable=[HIDDEN[0]])
        return sown[HIDDEN[0]][HIDDEN[1]][0], out

    def step(carry, _):
        params, state = carry
        gradient = jax.grad(lambda p: jnp.mean(jnp.square(outputs(p)[1] - eps)))(params)
        updates, state = rule.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    def run(params):
        (moved, _), _ = jax.lax.scan(step, (params, rule.init(params)), length=STEPS)
        pairs = zip(outputs(params), outputs(moved), strict=True)
        return [jnp.sqrt(jnp.mean(jnp.square(after - before))) for before, after in pairs]

    fast = jax.jit(run, compiler_options=FAST)
    return [float(change) for change in fast(jax.jit(wired.init)(jax.random.key(0)))]


@pytest.mark.thorough
def test_changes_of_activations_do_not_grow_with_the_width():
    """The coordinate check of Yang et al. 2022, figure 5: slopes of log change in log width.

    A step moves the outputs of a layer with n inputs by rate·n in the standard parametrisation, a
    slope up to 1, and by rate·n0 in muP, a slope of 0.
    """
    slopes = {}
    for base_width in (0, 32):
        moved = np.log([changes(width, base_width) for width in WIDTHS])
        slopes[base_width] = np.polyfit(np.log(WIDTHS), moved, 1)[0]
    assert np.abs(slopes[32]).max() < 0.2, slopes
    assert slopes[0][0] > 0.5, slopes
    assert slopes[0][1] > slopes[32][1] + 0.2, slopes


@pytest.mark.thorough
def test_the_study_trains_and_draws():
    config = config_of()
    config.num_steps = 3
    found = []
    for base_width in (0, 8):
        losses = final_losses(of_width(config, 16, base_width), digits(), (1e-3, 1e-2), 1)
        found.append(Losses(16, base_width > 0, (1e-3, 1e-2), losses))
        assert losses.shape == (2, 1)
        assert np.isfinite(losses).all()
    assert "| 16 | muP |" in table(found)
    assert plot(found)[1:4] == b"PNG"
    assert np.isnan(Losses(16, True, (1.0,), np.array([[np.nan]])).best_rate)
    with pytest.raises(UserError, match=r"images and their classes alone, and .* takes features"):
        final_losses(config_of("wrappers=repa"), digits(), (1e-3,), 1)
    config.model = spec(Tiny)
    with pytest.raises(UserError, match="no transformer with muP"):
        of_width(config, 16, 8)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--widths=32,48.5", "--widths=32,48.5: whole numbers are needed"),
        ("--widths=wide", "--widths: could not convert string to float"),
        ("--rates=0.1,0", "--rates=0.1,0: numbers above 0 are needed"),
    ],
)
def test_mistyped_numbers_of_the_study_are_one_line(capsys, tmp_path, flag, message):
    argv = ["--config=configs/digits.py", f"--out={tmp_path / 'out'}", flag]
    program = learning_rates
    assert cli.run(program.main, program.FLAGS, usage=program.USAGE, argv=argv) == 2
    error = capsys.readouterr().err
    assert message in error_line(error)
    assert not (tmp_path / "out").exists()
