"""Files of LoRA beside the weights of a run: the same model as with merged ones."""

import jax
import numpy as np
import pytest

from diffjax.conditions import Classes
from diffjax.errors import UserError
from diffjax.models.dit.network import DiT
from diffjax.models.families import AUTHORS, LAYOUTS, Found
from diffjax.models.loras import published_changes
from diffjax.models.loras import with_loras as merged_with
from diffjax.models.low_rank import LoraLayers, lora_layers, without_lora
from diffjax.pretrained.lora import NETWORK, LowRank, read_lora
from diffjax.pretrained.lora_writer import DIALECTS, write_lora
from diffjax.runs.samples.loras import with_loras
from diffjax.runs.setup import set_up
from diffjax.spec import spec
from tests.support.tiny_run import of_noise, one_device, tiny_config

LAYOUT = LAYOUTS[DiT][AUTHORS]


@pytest.fixture(scope="module")
def run():
    config = tiny_config()
    with config.unlocked():
        config.model = spec(DiT, patch_size=4, hidden_size=8, depth=2, num_heads=2, scan=True)
    return of_noise(set_up(config, (8, 8, 1), Classes(10), one_device()))


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    """Two files of unlike ranks and layers, of which one is of one block alone."""
    folder, denoiser, weights = tmp_path_factory.mktemp("loras"), run.parts.denoiser, {}
    for rank, layers, weight in ((2, "*attention*,conditioning/*", 0.8), (3, "*mlp*", -0.5)):
        lora = LoraLayers(rank=rank, alpha=5.0, layers=layers)
        with lora.on():
            shapes = jax.eval_shape(denoiser.init, jax.random.key(0), *denoiser.inputs)["params"]
        rng = np.random.default_rng(rank)
        params = jax.tree.map(lambda x, r=rng: 0.3 * r.normal(size=x.shape).astype("f"), shapes)
        changes = published_changes(params, lora.scale, LAYOUT, denoiser)
        if rank == 3:
            changes = [x for x in changes if x.layer.startswith("blocks.1.")]
        file = folder / f"{rank}.safetensors"
        write_lora(file, changes, DIALECTS["lora_kohya"])
        weights[str(file)] = weight
    return weights


def test_beside_the_weights_they_are_what_is_added_to_merged_ones(run, files):
    styled, base = with_loras(run, files), run.weights()
    assert [lora.facts["weight"] for lora in styled.loras] == [0.8, -0.5]
    params = styled.weights()
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, without_lora(params), dict(base)))
    found = Found(
        run.parts.denoiser, AUTHORS, LAYOUT, LAYOUT.to_theirs(base, run.parts.denoiser), "x"
    )
    loras = [read_lora(*file) for file in files.items()]
    expected = merged_with(found, loras, NETWORK).params()
    assert len(lora_layers(params)) == 6
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6),
        styled.merged(),
        expected,
    )


@pytest.mark.thorough
def test_samples_are_those_of_merged_weights(run, files):
    styled = with_loras(run, files)
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
    inputs = x, np.array([0.1, 0.5, 0.9], np.float32), np.array([0, 4, 9])
    found = jax.jit(styled.parts.wired.apply)(styled.weights(), *inputs)
    expected = jax.jit(run.parts.wired.apply)(styled.merged(), *inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(styled.sample(2, num_steps=2) - run.sample(2, num_steps=2)).max() > 1e-2


def test_what_can_not_be_beside_is_refused_in_one_line(run, files, loaded_run, tmp_path):
    one = np.ones((2, 8), np.float32)
    for layer, said in (
        (
            "blocks.0.attn.qvk",
            "which has no layer blocks_0_attn_qvk; did you mean blocks.0.attn.qkv",
        ),
        ("y_embedder.embedding_table", "is no kernel; merge it"),
        ("blocks.0.attn.proj", "its matrices are [3, 2] and [2, 8]"),
    ):
        up = np.ones((11 if "embedding" in layer else 3, 2), np.float32)
        write_lora(tmp_path / "x", [LowRank(layer, one, up, 1.0)], DIALECTS["lora_kohya"])
        with pytest.raises(UserError) as caught:
            with_loras(run, {str(tmp_path / "x"): 1.0})
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    for given in ({}, ["x"]):
        with pytest.raises(UserError, match="is to be files and weights"):
            with_loras(run, given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Tiny is no published network"):
        with_loras(loaded_run, dict(files))
