"""Training of LoRA: A and B alone move, have moments and averages, and are stored at each step."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.exchange.convert import convert
from diffjax.exchange.own_folders import read_own
from diffjax.loop import loop
from diffjax.models.low_rank import LoraLayers, lora_layers, without_lora
from diffjax.runs.initial import by_path
from diffjax.training.state import LIVE
from tests.support.shared_parts import shared_parts
from tests.support.tiny_run import (
    arrays_of,
    assert_same,
    loaded,
    on_one_device,
    one_device,
    tiny_config,
    trained_config,
    without_pictures,
)
from tests.training.test_subset import prepared, stepped

LORA = {"lora.rank": 2, "lora.alpha": 4.0, "lora.dropout": 0.1}


@pytest.fixture(scope="module")
def tuned(trained_run, tmp_path_factory):
    """Of all layers of a trained run; its page too."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        on_one_device(patch)
        shared_parts(patch)
        loop.train(trained_config(init_from=f"{trained_run}:live", **LORA), workdir)
    return workdir


@pytest.fixture(scope="module")
def tuned_run(tuned):
    """The same, loaded; to be read."""
    return loaded(tuned, mesh=one_device())


def test_training_moves_nothing_else_bit_for_bit(tuned, tuned_run, loaded_run):
    begun, run = by_path(loaded_run.weights(LIVE)), tuned_run
    assert lora_layers(run.weights(LIVE)) == ["conv_in", "final_conv"]
    for name in (LIVE, "ema-0.9", "ema-0.99"):
        jax.tree.map(
            np.testing.assert_array_equal,
            without_lora(run.weights(name)),
            dict(loaded_run.weights(LIVE)),
        )
        moved = by_path(run.weights(name)).keys() - begun.keys()
        assert moved == {f"{layer}/lora_{x}" for layer in ("conv_in", "final_conv") for x in "ab"}
        assert all(np.any(by_path(run.weights(name))[path]) for path in moved)
    state = run.state
    assert by_path(state.params).keys() == moved
    num_trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * num_trained
    assert json.loads((tuned / "run.json").read_text())["num_trained_params"] == num_trained
    stored = (tuned / "checkpoints" / "6" / "state" / "_METADATA").read_text()
    assert "lora_a" in stored
    assert "kernel" not in stored
    assert len(list((tuned / "frozen").glob("[0-9]*"))) == 1
    text = loop.page(tuned).read_text()
    assert f"{num_trained}: LoRA of rank 2, alpha 4, dropout 0.1, of *" in text


@pytest.mark.thorough(tenth=False)
def test_samples_are_those_of_the_merged_weights_in_a_folder_of_its_own(tuned, tuned_run, tmp_path):
    run = tuned_run
    out = tmp_path / "merged"
    assert convert(str(tuned), "diffjax", out, allowed_packages=("diffjax", "tests"))
    _, params = read_own(out, ("diffjax", "tests"))
    assert_same(params, run.merged(), rtol=0, atol=0)
    wired = prepared(trained_config(), one_device()).wired
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
    inputs = x, np.array([0.1, 0.5, 0.9], np.float32), np.array([0, 4, 9])
    found = jax.jit(run.parts.wired.apply)(run.weights(), *inputs)
    expected = jax.jit(wired.apply)(params, *inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert run.sample(2, num_steps=2).shape == (2, 8, 8, 1)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "arguments",
    ["objective=ddpm,model=dit", "objective=mean_flow,model=dit", "objective=edm,model=unet"],
)
@pytest.mark.parametrize("others", ["", "final_*"])
def test_any_objective_trains_it_and_what_else_is_named(arguments, others):
    config = tiny_config(arguments, trainable=others, **LORA)
    first, last = stepped(prepared(config))
    assert_same(first.frozen, last.frozen, rtol=0, atol=0)
    for path, leaf in by_path(first.params).items():
        assert re.search(r"/lora_[ab]$", path) or path.startswith("final_"), path
        assert np.any(by_path(last.params)[path] != leaf), path
    assert any(
        path.startswith("final_") and "lora" not in path for path in by_path(first.params)
    ) == bool(others)


@pytest.mark.thorough
def test_a_resumed_run_is_the_undisturbed_one_and_another_begins_with_it(
    tuned, tmp_path, monkeypatch
):
    without_pictures(monkeypatch)
    on_one_device(monkeypatch)
    shared_parts(monkeypatch)
    copy = shutil.copytree(tuned, tmp_path / "run")
    for step in ("4", "6"):
        shutil.rmtree(copy / "checkpoints" / step)
    loop.train(loaded(tuned).config, copy)
    assert_same(arrays_of(copy), arrays_of(tuned), rtol=0, atol=0)
    config = trained_config(init_from=f"{tuned}:live", num_steps=1, **LORA)
    loop.train(config, tmp_path / "further")
    assert_same(
        without_lora(loaded(tmp_path / "further").weights(LIVE)),
        without_lora(loaded(tuned).weights(LIVE)),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora.rank": 2}, "trains changes of given weights, and there are none: set --config.i"),
        ({"lora.rank": -1}, "config.lora.rank=-1 must be at least 0"),
        ({"lora.alpha": 2.0}, "has no effect with rank 0, which is no LoRA: set --config.lora.ra"),
        ({"lora.rank": 2, "lora.layers": "conv_inn"}, "matches 'conv_inn'; did you mean 'conv_in'"),
        ({"init_from": "{tuned}"}, "has LoRA, which this network has not: set --config.lora.rank"),
        ({"init_from": "{tuned}", "lora.rank": 3}, "conv_in/lora_a is [1, 2] there and [1, 3] in"),
    ],
)
def test_what_can_not_be_tuned_is_refused_in_one_line_before_anything_is_written(
    changes, said, tuned, tmp_path
):
    changes = {k: x.format(tuned=tuned) if isinstance(x, str) else x for k, x in changes.items()}
    with pytest.raises(UserError) as caught:
        loop.train(trained_config(**changes), tmp_path / "run")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_lora_of_rank_0_is_none():
    assert not lora_layers(prepared(trained_config()).wired.params_shape)
    assert LoraLayers().trainable("") == ""
