"""LoRA on a network in any of its layouts."""

import jax
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.models.families import LAYOUTS, Found
from diffjax.models.loras import with_loras
from diffjax.models.stable_diffusion.published import FAMILY, LDM
from diffjax.pretrained.files import write_safetensors
from diffjax.pretrained.lora import NETWORK, read_lora
from tests.models.published.test_stable_diffusion import SMALL, drawn
from tests.models.test_mmdit import network_of, state_of

PAIRS = {
    "down_blocks.0.attentions.0.transformer_blocks.1.attn1.to_v": (
        "input_blocks.1.1.transformer_blocks.1.attn1.to_v"
    ),
    "up_blocks.1.resnets.1.conv_shortcut": "output_blocks.3.0.skip_connection",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj": (
        "output_blocks.2.1.transformer_blocks.0.ff.net.0.proj"
    ),
}
"""Layers by their names in diffusers and in the authors' files."""


@pytest.fixture(scope="module")
def found():
    """A small U-Net of Stable Diffusion, as of a folder of diffusers."""
    network = FAMILY.network(**SMALL)
    state = FAMILY.to_theirs(drawn(network), network)
    return Found(network, "diffusers", FAMILY, state, "net")


def written(file, state, names, rank=3):
    """A LoRA of kohya's of these layers."""
    random, tensors = np.random.default_rng(0), {}
    for name, called in names.items():
        out, *rest = state[f"{name}.weight"].shape
        begin = f"lora_unet_{called.replace('.', '_')}"
        down, up = random.normal(size=(rank, *rest)), random.normal(size=(out, rank, *rest[1:][:0]))
        tensors[f"{begin}.lora_down.weight"] = down.astype(np.float32)
        tensors[f"{begin}.lora_up.weight"] = up.astype(np.float32)
        tensors[f"{begin}.alpha"] = np.float32(2.0)
    write_safetensors(file, tensors)
    return read_lora(file, 0.5)


@pytest.mark.thorough(tenth=False)
def test_a_file_in_the_names_of_the_authors_changes_weights_in_those_of_diffusers(found, tmp_path):
    own = written(tmp_path / "own.safetensors", found.state, {name: name for name in PAIRS})
    others = written(tmp_path / "other.safetensors", found.state, PAIRS)
    one, other = (with_loras(found, [lora], NETWORK) for lora in (own, others))
    assert (one.layout, other.family) == ("diffusers", LDM)
    jax.tree.map(np.testing.assert_array_equal, one.params(), other.params())
    # Where it is not named, each bit is as before.
    before, after = found.state, FAMILY.to_theirs(one.params(), found.network)
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert sorted(changed) == sorted(f"{name}.weight" for name in PAIRS)
    for name in PAIRS:
        (change,) = (x for x in own.parts[NETWORK] if x.layer == name.replace(".", "_"))
        w = before[f"{name}.weight"]
        product = np.asarray(change.up).reshape(len(w), 3) @ np.asarray(change.down).reshape(3, -1)
        expected = w + 0.5 * (2 / 3) * product.reshape(w.shape)
        np.testing.assert_allclose(after[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)


def test_weight_0_and_another_part_change_nothing(found, tmp_path):
    lora = written(tmp_path / "x.safetensors", found.state, PAIRS)
    assert with_loras(found, [read_lora(lora.file, 0.0)], NETWORK) is found
    assert with_loras(found, [lora], "text_encoder") is found


def test_a_layer_of_no_layout_is_named_with_the_nearest_of_the_nearest_layout(found, tmp_path):
    names = dict(PAIRS) | {"mid_block.resnets.1.conv2": "middle_block.2.out_layers.4"}
    lora = written(tmp_path / "x.safetensors", found.state, names)
    with pytest.raises(UserError, match="which has no layer middle_block_2_out_layers_4; did you"):
        with_loras(found, [lora], NETWORK)


@pytest.mark.thorough
def test_fused_layers_of_flux_change_queries_keys_and_values_of_diffusers(tmp_path):
    """Rows of B are those of the authors' fused layer; A is shared."""
    network, state = network_of("Flux.1 dev"), state_of("Flux.1 dev")
    parts = [f"transformer_blocks.0.attn.to_{part}.weight" for part in "qkv"]
    width, inputs = state[parts[0]].shape
    down, up = np.ones((2, inputs), "f"), np.arange(6 * width, dtype="f").reshape(-1, 2)
    begin = "lora_unet_double_blocks_0_img_attn_qkv.lora"
    tensors = {f"{begin}_down.weight": down, f"{begin}_up.weight": up}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    layout = LAYOUTS[type(network.network)]["diffusers"]
    found = Found(network, "diffusers", layout, state, "net")
    found = with_loras(found, [read_lora(tmp_path / "x.safetensors")], NETWORK)
    after = layout.to_theirs(found.params(), network)
    for part, rows in zip(parts, np.split(up, 3), strict=True):
        np.testing.assert_allclose(after[part], state[part] + rows @ down, rtol=1e-6)
    for name in state.keys() - set(parts):
        np.testing.assert_array_equal(after[name], state[name], name)
